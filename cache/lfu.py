"""Least frequently used goes first, where uses long ago count less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

HALF_LIFE_USES = 128
"""A use counts half as much after this many later uses in the layer (64 tokens at top-2, 16 at top-8)."""

_LARGEST_WEIGHT = 2.0**500


class LFUPolicy:
    """Eviction order by faded number of uses; among equally many the later uses count more.

    Counts outlive eviction, or an expert that comes and goes would start from nothing each time (1 to 4
    points of hit rate on recorded routes). But popularity belongs to a request, not to a model, so uses
    fade by half with every `HALF_LIFE_USES` later ones. Without that, a change of topic costs 5 to 13
    points. This is LRFU (Lee et al., IEEE Trans. Computers 50(12), 2001) with uses for a clock.

    Instead of making all old uses smaller, each new one weighs a little more than the last.
    A use is O(1), an eviction O(n log n) over the n known experts.
    """

    __slots__ = ("_forgotten", "_growth", "_known", "_weight")

    def __init__(self) -> None:
        self._known: dict[int, float] = {}
        """Weighted uses of each known expert."""
        self._forgotten: dict[int, float] = {}
        """Those of experts that were removed."""
        self._weight = 1.0
        self._growth: float = 2.0 ** (1 / HALF_LIFE_USES)

    def touch(self, experts: Sequence[int]) -> None:
        known, weight, growth = self._known, self._weight, self._growth
        for expert in experts:
            known[expert] += weight
            weight *= growth
        self._weight = weight
        if weight > _LARGEST_WEIGHT:
            self._rescale()

    def insert(self, expert: int) -> None:
        self._known[expert] = self._forgotten.pop(expert, 0.0) + self._weight
        self._weight *= self._growth
        if self._weight > _LARGEST_WEIGHT:
            self._rescale()

    def remove(self, expert: int) -> None:
        self._forgotten[expert] = self._known.pop(expert)

    def coldest(self) -> Iterator[int]:
        return iter(sorted(self._known, key=self._known.__getitem__))

    def __len__(self) -> int:
        return len(self._known)

    def _rescale(self) -> None:
        """Divide everything by the weight, which keeps the order and the float range."""
        for uses in (self._known, self._forgotten):
            for expert, count in uses.items():
                uses[expert] = count / self._weight
        self._weight = 1.0
