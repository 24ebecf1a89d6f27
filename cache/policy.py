"""What an eviction policy is: an order over the experts of one layer, coldest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """The eviction order of one layer's experts in one tier.

    Pure bookkeeping over expert numbers: it never sees slots, pins or bytes. The cache tells it what
    happened and walks `coldest()` until it meets an expert that may go. Every expert in the cache
    (loading or resident) is known to the policy between `insert` and `remove`.
    """

    def touch(self, experts: Sequence[int]) -> None:
        """These experts, all known, were needed in one step, in the router's order."""

    def insert(self, expert: int) -> None:
        """An unknown expert was given a slot; it becomes known and counts as used now."""

    def remove(self, expert: int) -> None:
        """A known expert lost its slot."""

    def coldest(self) -> Iterator[int]:
        """Known experts, the best victim first. The policy is not changed while this is walked.

        One walk gives all victims of a step, after the step's hits were touched.
        """

    def __len__(self) -> int:
        """How many experts are known."""
