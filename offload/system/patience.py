"""How long to wait for a disk that does not answer."""

from __future__ import annotations

import os
import threading
import time

from moe_local.cache.errors import OptionError

PATIENCE_S = 120.0
"""A disk takes 15 seconds to spin up, and the slowest link a minute for four pieces of 4 MiB."""

VARIABLE = "MOE_LOCAL_DISK_TIMEOUT"
"""The environment variable that overrides PATIENCE_S."""

SLOW = "is being read, and its disk has given nothing for {:.0f} s; check the disk, or what connects it"

LONGEST_WAIT_S = 1.0
"""The most that one wait adds, so that time in which the process was stopped does not count as waiting."""


class Patience:
    """Adds up the time waited since the last progress. Used under its owner's lock."""

    def __init__(self) -> None:
        """Raises OptionError if the environment variable is not a positive number."""
        self.seconds = _from_environment()
        """The value of the environment variable, or else PATIENCE_S."""
        self._waited = 0.0

    def moved(self) -> None:
        """There was progress, so waiting starts from zero."""
        self._waited = 0.0

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        """Wait at most `seconds` for the condition, whose lock the caller holds."""
        start = time.monotonic()
        changed.wait(seconds)
        self._waited += min(time.monotonic() - start, LONGEST_WAIT_S)

    def is_over(self) -> bool:
        """Whether there was no progress for `self.seconds` of waiting. If so, waiting starts from zero."""
        if self._waited < self.seconds:
            return False
        self._waited = 0.0
        return True


def _from_environment() -> float:
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or PATIENCE_S)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise OptionError(f"{VARIABLE}={text} is not a number of seconds above 0, such as {PATIENCE_S:.0f}")
    return seconds
