"""What an eviction policy is: an order over the experts of one layer, coldest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """The eviction order of one layer's experts in one tier.

    Pure bookkeeping over expert numbers: it never sees slots, pins or bytes. The cache tells it what
    happened and walks `coldest()` until it meets an expert that may be evicted. Every expert in the cache
    (loading or resident) is known to the policy between `insert` and `remove`.

    Being needed and having a slot are two different things: a prefetched expert has a slot before it is
    needed, and one that the CPU computes in place is needed without ever having one.
    """

    def touch(self, experts: Sequence[int], absent: Sequence[int] = ()) -> None:
        """One step needs these experts, given in the router's order; `absent` are the unknown among them.

        The cache inserts the absent ones afterwards, once the step's victims have been removed.
        """

    def pass_over(self, experts: Sequence[int]) -> None:
        """A step needs these experts but computes them outside this tier; unknown ones are not inserted."""

    def insert(self, expert: int) -> None:
        """An unknown expert was given a slot; it becomes known."""

    def remove(self, expert: int) -> None:
        """A known expert lost its slot."""

    def coldest(self) -> Iterator[int]:
        """Known experts, the best victim first. The policy must not change while the caller iterates.

        After `touch`, one iteration yields all victims of a step.
        """

    def __len__(self) -> int:
        """How many experts are known."""
