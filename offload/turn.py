"""Whose turn it is: a model answers one caller at a time."""

from __future__ import annotations

import threading

from moe_local.cache.errors import MoeLocalError


class Turn:
    """A lock that waits for other threads, but tells a thread that would wait for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def begin(self) -> None:
        """Take the turn; blocks while another thread has it.

        Raises MoeLocalError if this thread has it already: an earlier stream was neither finished nor closed.
        """
        if self._owner == threading.get_ident():
            raise MoeLocalError("the model is in the middle of another answer; finish its stream or close() it first")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def end(self) -> None:
        """Give the turn back."""
        self._owner = None
        self._lock.release()
