"""How long somebody waits for a disk that gives nothing."""

from __future__ import annotations

import threading
import time

PATIENCE_S = 120.0
"""A disk that has to spin up takes 15 seconds; four pieces of 4 MiB from the slowest link, a minute."""

SLOW = "is being read, and its disk has given nothing for {:.0f} s; check the disk, or what connects it"

LONGEST_WAIT_S = 1.0
"""Most that one wait adds, so that a process that was stopped meanwhile does not take that for waiting."""


class Patience:
    """Adds up the time that is waited since something last came. Used under its owner's lock."""

    def __init__(self, seconds: float = PATIENCE_S) -> None:
        self.seconds = seconds
        self._waited = 0.0

    def moved(self) -> None:
        """Something came."""
        self._waited = 0.0

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        """Wait for the condition, which is held, at most so long."""
        start = time.monotonic()
        changed.wait(seconds)
        self._waited += min(time.monotonic() - start, LONGEST_WAIT_S)

    def is_over(self) -> bool:
        """Whether nothing has come for `seconds` of waiting. Then it begins anew."""
        if self._waited < self.seconds:
            return False
        self._waited = 0.0
        return True
