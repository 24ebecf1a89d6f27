"""Ctrl-C at safe points only, with real signals to this process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from moe_local.offload.system import interrupt


@pytest.fixture(autouse=True)
def _python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler was not restored"
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_waits_for_the_check() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt.deferred():
        interrupt.check()
        press()
        reached.append("after the signal")
        interrupt.check()
        reached.append("after the check")
    assert reached == ["after the signal"]


def test_is_raised_at_the_end_when_nobody_checked() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), interrupt.deferred():
        press()
        done = True
    assert done
    with interrupt.deferred():
        interrupt.check()


def test_nested_blocks_are_one() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt.deferred():
        with interrupt.deferred():
            press()
        reached.append("inner block left")
        interrupt.check()
    assert reached == ["inner block left"]


def test_an_error_is_kept_as_context() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupt.deferred():
        press()
        raise ValueError("the other one")
    assert isinstance(caught.value.__context__, ValueError)


def test_an_error_alone_passes() -> None:
    with pytest.raises(ValueError, match="alone"), interrupt.deferred():
        raise ValueError("alone")


def test_impatience_raises_at_once() -> None:
    pressed = 0
    with pytest.raises(KeyboardInterrupt), interrupt.deferred():
        for _ in range(interrupt.IMPATIENCE + 1):
            press()
            pressed += 1
    assert pressed == interrupt.IMPATIENCE - 1


def test_another_handler_stays_in_charge() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda signum, frame: seen.append(signum))
    try:
        with interrupt.deferred():
            press()
            interrupt.check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == [signal.SIGINT]


def test_other_threads_are_left_alone() -> None:
    result: list[str] = []

    def work() -> None:
        with interrupt.deferred():
            interrupt.check()
            result.append("done")

    with pytest.raises(KeyboardInterrupt), interrupt.deferred():
        press()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert result == ["done"]


@pytest.fixture
def taken() -> Iterator[None]:
    """Both signals are ours, as in the command."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    interrupt.take_signals()
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.mark.usefixtures("taken")
def test_sigterm_waits_as_ctrl_c_does() -> None:
    reached = []
    with pytest.raises(interrupt.Terminated) as caught, interrupt.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after the signal")
        interrupt.check()
        reached.append("after the check")
    assert reached == ["after the signal"]
    assert caught.value.code == 143
    with pytest.raises(KeyboardInterrupt), interrupt.deferred():
        press()
    with pytest.raises(interrupt.Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    with interrupt.deferred():
        interrupt.check()


@pytest.mark.usefixtures("taken")
def test_sigterm_waits_where_ctrl_c_is_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt.take_signals()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    reached = False
    with pytest.raises(interrupt.Terminated), interrupt.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        reached = True
    assert reached
