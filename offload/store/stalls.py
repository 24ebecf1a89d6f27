"""Accounts for stalls: seconds by cause."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import asdict

from moe_local.cache.stats import StallSeconds
from moe_local.offload.tiers.device import Waited

MOST_WAITS = 1024
"""Most waits of a device whose times are still unread; beyond that the older half is read."""


class StallAccount:
    """Stall seconds since the model was loaded. A device's waits are charged once their times can be read.

    Any thread may ask for the totals, which settles pending waits, while another thread adds more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(("demand", "late_prefetch", "disk", "cpu", "sync"), 0.0)
        self._waits: deque[tuple[str, Waited]] = deque()

    def add_stall(self, cause: str, seconds: float) -> None:
        """Charge a wait to a cause, a field of StallSeconds."""
        with self._lock:
            self._seconds[cause] += seconds

    def add_wait(self, cause: str, waited: Waited) -> None:
        """Charge a wait of the device's stream to a cause, once its time can be read."""
        self._waits.append((cause, waited))
        if len(self._waits) > MOST_WAITS:
            self._settle(MOST_WAITS // 2)

    def total(self) -> float:
        """Seconds of all causes. On a device this waits for the timing of stalls still under way."""
        self._settle()
        return sum(self._seconds.values())

    def by_cause(self) -> StallSeconds:
        """As `total`."""
        self._settle()
        return StallSeconds(**self._seconds)

    def reset(self, seconds: StallSeconds) -> None:
        """Set the seconds of all causes to these."""
        self._settle()
        self._seconds = asdict(seconds)

    def _settle(self, keep: int = 0) -> None:
        """Charge pending waits of the device's stream; they are over once a token has come back from it."""
        while len(self._waits) > keep:
            try:  # removed first, so that one whose time cannot be read is not asked again
                cause, waited = self._waits.popleft()
            except IndexError:  # another thread that reads the totals has taken the last one
                return
            self.add_stall(cause, waited.seconds())
