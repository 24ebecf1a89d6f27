"""How long to wait for a disk that does not answer."""

from __future__ import annotations

import os
import threading
import time

from moe_local.cache.errors import OptionError

PATIENCE_S = 120.0
"""A disk that has to spin up takes 15 seconds; four pieces of 4 MiB from the slowest link, a minute."""

VARIABLE = "MOE_LOCAL_DISK_TIMEOUT"
"""Environment variable with other seconds."""

SLOW = "is being read, and its disk has given nothing for {:.0f} s; check the disk, or what connects it"

LONGEST_WAIT_S = 1.0
"""Most that one wait adds, so that a process that was stopped meanwhile does not take that for waiting."""


class Patience:
    """Adds up the time that is waited since something last came. Used under its owner's lock."""

    def __init__(self) -> None:
        """Raises OptionError where the environment names what is no time."""
        self.seconds = _from_environment()
        """As the environment says, or else PATIENCE_S."""
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


def _from_environment() -> float:
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or PATIENCE_S)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise OptionError(f"{VARIABLE}={text} is not a number of seconds above 0, such as {PATIENCE_S:.0f}")
    return seconds
