"""Whose turn it is: a model answers one caller at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.system.interrupt import LOOK_SECONDS
from moe_local.offload.system.interrupt import check as check_interrupt


class Turn:
    """A lock that waits for other threads, but raises where a thread would wait for itself.

    After `retire` nobody gets it any more, those who wait for it included.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._retired: str | None = None
        self._process = os.getpid()

    @property
    def lost(self) -> bool:
        """Whether this is a fork's copy: locks that other threads held, and those threads, are gone."""
        return os.getpid() != self._process

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner == threading.get_ident()

    def begin(self, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Take the turn; blocks while another thread has it, until `given_up` says so. Whether it was taken.

        Raises MoeLocalError if this thread has it already (an earlier stream was neither finished nor
        closed), nobody can have it or this is a fork's copy, KeyboardInterrupt for a Ctrl-C while waiting.
        """
        self.check_process()
        if self.mine:
            raise MoeLocalError(
                "the model is in the middle of another answer; finish its stream or close() it first"
            )
        while not self._lock.acquire(timeout=LOOK_SECONDS):
            check_interrupt()
            if given_up():
                return False
        if self._retired is not None:
            self._lock.release()
            raise MoeLocalError(self._retired)
        self._owner = threading.get_ident()
        return True

    def carry_on(self) -> None:
        """Hand the turn to this thread: a pool may drive a stream, with each token in another thread."""
        self.check_process()
        self._owner = threading.get_ident()

    def end(self) -> None:
        """Give the turn back."""
        self._owner = None
        self._lock.release()

    def check_process(self) -> None:
        """Raises MoeLocalError in a fork."""
        if self.lost:
            raise MoeLocalError(
                f"the model was loaded in process {self._process}, and a fork has no threads to run it; "
                f"load() it in process {os.getpid()}, too"
            )

    def retire(self, reason: str) -> None:
        """Refuse all that begin from now on with MoeLocalError(reason). Call with the turn."""
        self._retired = reason
