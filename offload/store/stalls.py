"""What is waited for, and how long: seconds by cause."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import asdict

from moe_local.cache.stats import StallSeconds
from moe_local.offload.tiers.device import Waited

MOST_WAITS = 1024
"""Most waits of a device whose seconds have not been read; with more, the older half is read unasked."""


class StallAccount:
    """Stall seconds since load. A device's waits are charged once it is known how long they were.

    Any thread may look, and so settles waits, while another one charges more.
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
        """Charge a wait of the device's stream to a cause, once it is known how long it was."""
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
        """Charge the waits of the device's stream, which are over once a token has come back from it."""
        while len(self._waits) > keep:
            try:  # taken out first: one that a device cannot tell is not asked again
                cause, waited = self._waits.popleft()
            except IndexError:  # another thread, which looks at the figures, has asked for the last one
                return
            self.add_stall(cause, waited.seconds())
