"""Ctrl-C without half a token: SIGINT waits for a point where nothing is half done.

Inside `deferred()` a Ctrl-C is only remembered; `check()`, called where everything is consistent (the start
of a MoE layer, each turn of a wait loop), raises it as KeyboardInterrupt. This works on the main thread and
only where Python's own SIGINT handler is installed; with any other handler, and on other threads, both do
nothing, since whoever installed that handler has decided what Ctrl-C means.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

IMPATIENCE = 3
"""So many Ctrl-C with no safe point between them raise at once: somebody waits at a hung device."""


class _Deferral:
    """The handler in place of Python's own. Signals reach the main thread only, so no lock is needed."""

    def __init__(self) -> None:
        self.active = False
        self.presses = 0

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.presses += 1
        if self.presses >= IMPATIENCE:
            self.raise_pending()

    def raise_pending(self) -> None:
        if self.presses:
            self.presses = 0
            raise KeyboardInterrupt


# One for the process, as the signal handler is.
_deferral = _Deferral()


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def deferred() -> Iterator[None]:
    """Hold SIGINT back until `check()`, or until the outermost block ends. Nests.

    Raises KeyboardInterrupt at the end of the outermost block when one is still pending; if the block ends
    by another exception, that one becomes its context.
    """
    if (
        _deferral.active
        or not _on_main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    _deferral.presses = 0
    try:
        # inside the try: a Ctrl-C between any two of these lines must find its way to `finally`
        signal.signal(signal.SIGINT, _deferral.handle)
        _deferral.active = True
        yield
    finally:
        _deferral.active = False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _deferral.raise_pending()


def is_deferred() -> bool:
    """Whether SIGINT is held back already, or is not ours to hold back on this thread."""
    return _deferral.active or not _on_main_thread()


def check() -> None:
    """Raise the KeyboardInterrupt that `deferred()` holds back, if there is one. Costs 0.1 microseconds."""
    if _deferral.active and _deferral.presses and _on_main_thread():
        _deferral.raise_pending()
