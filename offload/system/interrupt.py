"""Defers Ctrl-C and SIGTERM to points where all state is consistent, so that no token stays half computed.

Inside `deferred()` a Ctrl-C is only recorded; `check()`, called where state is consistent (the start of a MoE
layer, each turn of a wait loop), raises it as KeyboardInterrupt. This works on the main thread, and only if
SIGINT has Python's own handler or ours. With any other handler, whose owner has decided what Ctrl-C means,
and on other threads, both do nothing. SIGTERM is treated in the same way once `take_signals()` has been
called, as the moe-local command does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LOOK_SECONDS = 0.1
"""The longest that any wait loop waits before it calls `check` again."""

IMPATIENCE = 3
"""How many Ctrl-C without a `check` between them raise at once, since the device may have hung."""

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes of a process that ended because of Ctrl-C or SIGTERM, by the convention of shells."""


class Terminated(SystemExit):
    """SIGTERM came. Not a KeyboardInterrupt, since code that goes on after a Ctrl-C must end at a SIGTERM."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class _Deferral:
    """Our signal handler and its state. Handlers run on the main thread only, so no lock is needed."""

    def __init__(self) -> None:
        self.active = False
        self.presses = 0
        self.terminated = False
        """Whether one of the recorded signals was SIGTERM."""
        self.broke_import: int | None = None
        """The exit code for a signal that came in the middle of an import."""

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.presses += 1
        self.terminated |= signum == signal.SIGTERM
        if not self.active and _is_importing(frame):
            if _is_importing_native():
                os._exit(128 + signum)
            self.broke_import = 128 + signum
        if self.presses >= IMPATIENCE or not self.active:
            self.raise_pending()

    def raise_pending(self) -> None:
        if self.presses:
            terminated = self.terminated
            self.forget()
            raise Terminated if terminated else KeyboardInterrupt

    def forget(self) -> None:
        self.presses, self.terminated = 0, False


# One per process, like signal handlers.
_deferral = _Deferral()


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _is_importing_native() -> bool:
    """Whether torch or Triton is being imported: their C++ code calls back into Python then, and an exception
    that reaches that code aborts the process. None of our own work is running at that time."""
    specs = (getattr(sys.modules.get(name), "__spec__", None) for name in ("torch", "triton"))
    return any(getattr(spec, "_initializing", False) for spec in specs)


def take_signals() -> None:
    """From now on, SIGTERM raises Terminated, at once or where a deferred Ctrl-C would be raised.

    Call it on the main thread, in a process of our own. A signal that the process was told to ignore (by
    `nohup`, or in the background of a script) stays ignored.
    """
    for kind in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, _deferral.handle)


def broken_import() -> int | None:
    """The exit code for a signal that interrupted an import, if one did since `take_signals`.

    Libraries catch all exceptions around their optional imports, so the signal may be the cause of an
    unrelated error later.
    """
    return _deferral.broke_import


def check_imports() -> None:
    """Raise Terminated if a SIGTERM interrupted an import, and the library that imported caught it."""
    if _deferral.broke_import == TERMINATED and _on_main_thread():
        raise Terminated


@contextmanager
def deferred() -> Iterator[None]:
    """Defer SIGINT and, after `take_signals`, SIGTERM until `check()`, or until the outermost block ends.

    May be nested. Raises KeyboardInterrupt or Terminated at the end of the outermost block if a signal is
    still pending; if the block ends by another exception, that one becomes its context.
    """
    if _deferral.active or not _on_main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    python, ours = before is signal.default_int_handler, before == _deferral.handle
    if not python and not ours and signal.getsignal(signal.SIGTERM) != _deferral.handle:
        yield
        return
    _deferral.forget()
    try:
        # inside the try, since a Ctrl-C between any two of these lines must reach `finally`
        if python:
            signal.signal(signal.SIGINT, _deferral.handle)
        _deferral.active = True
        yield
    finally:
        try:
            if python:  # still deferred, since setting a handler runs the previous one for a pending signal
                signal.signal(signal.SIGINT, signal.default_int_handler)
        finally:
            _deferral.active = False
        _deferral.raise_pending()


def is_deferred() -> bool:
    """Whether SIGINT is already deferred, or cannot be, since this is not the main thread."""
    return _deferral.active or not _on_main_thread()


def check() -> None:
    """Raise the exception for a signal that `deferred()` holds back, if any. Costs 0.1 microseconds."""
    if _deferral.active and _deferral.presses and _on_main_thread():
        _deferral.raise_pending()
