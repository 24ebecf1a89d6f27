"""One caller at a time."""

from __future__ import annotations

import threading
import time

import pytest

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.turn import Turn


def test_threads_have_it_one_after_another() -> None:
    turn = Turn()
    inside: list[int] = []
    most: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            turn.begin()
            inside.append(i)
            most.append(len(inside))
            time.sleep(0.0002)
            inside.remove(i)
            turn.end()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(most) == 100
    assert set(most) == {1}


def test_a_thread_that_would_wait_for_itself_is_told() -> None:
    turn = Turn()
    turn.begin()
    assert turn.mine
    with pytest.raises(MoeLocalError, match="in the middle of another answer"):
        turn.begin()
    turn.end()
    assert not turn.mine
    turn.begin()
    turn.end()


def test_another_thread_may_end_it() -> None:
    turn = Turn()
    turn.begin()
    thread = threading.Thread(target=turn.end)
    thread.start()
    thread.join()
    assert not turn.mine
    turn.begin()
    turn.end()


def test_it_is_nobody_elses() -> None:
    turn = Turn()
    turn.begin()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(turn.mine))
    thread.start()
    thread.join()
    assert found == [False]
    turn.end()


def test_retired_it_refuses_those_who_wait_and_those_who_come() -> None:
    turn = Turn()
    turn.begin()
    refused: list[str] = []

    def wait() -> None:
        try:
            turn.begin()
        except MoeLocalError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    turn.retire("the model is closed")
    turn.end()
    for thread in threads:
        thread.join(100)
    assert refused == ["the model is closed"] * 3
    with pytest.raises(MoeLocalError, match="the model is closed"):
        turn.begin()
    assert not turn.mine


def test_ctrl_c_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Turn()
    turn.begin()
    raised: list[str] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    def wait() -> None:
        try:
            turn.begin()
        except KeyboardInterrupt:
            raised.append("Ctrl-C")

    monkeypatch.setattr("moe_local.offload.turn.check_interrupt", interrupted)
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(100)
    assert raised == ["Ctrl-C"]
    turn.end()
    turn.begin()
    turn.end()
