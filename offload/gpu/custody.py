"""Who decides which expert is in which slot: the host, or for the time being the device."""

from __future__ import annotations

from typing import Protocol


class Custody(Protocol):
    """The host's side of it: called by the ExpertStore before it looks or acts."""

    def settle_counts(self) -> None:
        """Bring the counts of hits, misses, bytes and stalls up to the last token. Waits for the device."""

    def catch_up(self) -> None:
        """Bring the cache's tables, too, up to what the device has done. Waits for the device."""

    def release(self) -> None:
        """Hand the slots back: the host's tables are up to date, and the device reads and writes no slot."""

    def check_integrity(self) -> None:
        """Raise RuntimeError unless both agree on who is where. Waits for the device."""


class Switch(Protocol):
    """Turns a model from the host's way of misses to the device's and back. Between two steps only."""

    on_device: bool

    def turn(self, *, to_device: bool) -> None: ...


class HostAlone:
    """The Custody where only the host decides: there is nothing to do."""

    def settle_counts(self) -> None:
        pass

    def catch_up(self) -> None:
        pass

    def release(self) -> None:
        pass

    def check_integrity(self) -> None:
        pass
