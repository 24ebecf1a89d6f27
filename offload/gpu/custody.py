"""Custody of the slots: whether the host or, temporarily, the device decides which expert is where."""

from __future__ import annotations

from typing import Protocol


class Custody(Protocol):
    """The host's side of custody: the ExpertStore calls it before it reads or changes the cache's state."""

    def settle_counts(self) -> None:
        """Bring the counts of hits, misses, bytes and stalls up to the last token. Waits for the device."""

    def catch_up(self) -> None:
        """Bring counts and the cache's tables up to the last token. Waits for the device.

        gpu/device_misses.py returns at once, with nothing updated, if another thread calls it during a token.
        """

    def release(self) -> None:
        """Hand the slots back: the host's tables are up to date, and the device reads and writes no slot."""

    def check_integrity(self) -> None:
        """Raise RuntimeError unless host and device agree on each slot's expert. Waits for the device."""


class Switch(Protocol):
    """Switches between misses served by the host and by the device. Call it only between two steps."""

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
