"""Ctrl-C and SIGTERM without half a token: they wait for a point where nothing is half done.

Inside `deferred()` a Ctrl-C is only remembered; `check()`, called where everything is consistent (the start
of a MoE layer, each turn of a wait loop), raises it as KeyboardInterrupt. This works on the main thread and
only where SIGINT has Python's own handler or ours; with any other handler, and on other threads, both do
nothing, since whoever installed that handler has decided what Ctrl-C means. SIGTERM goes the same way once
`take_signals()` was called, as the command does.
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
"""Longest wait before `check` is called again, wherever somebody waits."""

IMPATIENCE = 3
"""This many Ctrl-C with no safe point between them raise at once: the device may have hung."""

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes of a process that ended because of Ctrl-C or SIGTERM, as shells have it."""


class Terminated(SystemExit):
    """SIGTERM came. No KeyboardInterrupt, since whoever goes on after Ctrl-C must end at this one."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class _Deferral:
    """The handlers in place of Python's own. Signals reach the main thread only, so no lock is needed."""

    def __init__(self) -> None:
        self.active = False
        self.presses = 0
        self.terminated = False
        """Whether one of the presses was SIGTERM."""
        self.broke_import: int | None = None
        """The exit code of a signal that came in the middle of an import."""

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.presses += 1
        self.terminated |= signum == signal.SIGTERM
        if not self.active and _is_importing(frame):
            if _is_importing_torch():
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


# One for the process, as signal handlers are.
_deferral = _Deferral()


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _is_importing_torch() -> bool:
    """Whether C++ may stand above us on the stack that an exception would abort the process in: torch's
    import registers what it is made of with calls back into Python. Nothing of ours is under way then."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def take_signals() -> None:
    """From now on SIGTERM raises Terminated, at once or where a Ctrl-C would be raised. On the main thread.

    For a process of our own. What it was told to ignore (`nohup`, the background of a script) stays ignored.
    """
    for kind in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, _deferral.handle)


def broken_import() -> int | None:
    """The exit code of a signal that broke an import, if one did since `take_signals`.

    Libraries catch everything around their optional imports, and what fails later is not to blame.
    """
    return _deferral.broke_import


@contextmanager
def deferred() -> Iterator[None]:
    """Hold SIGINT and, where it is ours, SIGTERM back until `check()`, or until the outermost block ends.

    Nests. Raises KeyboardInterrupt or Terminated at the end of the outermost block when one is still pending;
    if the block ends by another exception, that one becomes its context.
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
        # inside the try: a Ctrl-C between any two of these lines must find its way to `finally`
        if python:
            signal.signal(signal.SIGINT, _deferral.handle)
        _deferral.active = True
        yield
    finally:
        try:
            if python:  # while it is still held back: setting a handler runs the one before for what came
                signal.signal(signal.SIGINT, signal.default_int_handler)
        finally:
            _deferral.active = False
        _deferral.raise_pending()


def is_deferred() -> bool:
    """Whether SIGINT is held back already, or is not ours to hold back on this thread."""
    return _deferral.active or not _on_main_thread()


def check() -> None:
    """Raise what `deferred()` holds back, if there is something. Costs 0.1 microseconds."""
    if _deferral.active and _deferral.presses and _on_main_thread():
        _deferral.raise_pending()
