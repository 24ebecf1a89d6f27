"""Evicts the least frequently used expert first, where uses long ago count less."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

HALF_LIFE_USES = 144
"""A use counts half as much after this many later uses in the layer (72 tokens at top-2, 18 at top-8)."""

_NEXT_CHOICE = 0.94
"""Within a step, each of the router's choices counts this fraction of the previous choice, since its router
weight is smaller."""

_LARGEST_WEIGHT = 2.0**500


class LFUPolicy:
    """Eviction order by number of uses, which fade; with equal numbers, the experts used later count more.

    Counts are kept after eviction; otherwise an expert that comes and goes would start from zero each time
    (1 to 4 points of hit rate on recorded routes). But popularity belongs to a request, not to a model, so a
    use counts half as much after `HALF_LIFE_USES` later ones. Without that, a change of topic costs 5 to 13
    points. This is LRFU (Lee et al., IEEE Trans. Computers 50(12), 2001) with the number of uses as clock.

    Instead of scaling down all old uses, each new use weighs a little more than the last.
    A use is O(1), an eviction O(n log n) over the n known experts.
    """

    __slots__ = ("_growth", "_known", "_weight", "uses")

    def __init__(self) -> None:
        self.uses: defaultdict[int, float] = defaultdict(float)
        """Weighted uses of every expert ever needed, on a scale that changes from step to step."""
        self._known: dict[int, None] = {}
        self._weight = 1.0
        self._growth: float = 2.0 ** (1 / HALF_LIFE_USES)

    def touch(self, experts: Sequence[int], absent: Sequence[int] = ()) -> None:
        uses, weight = self.uses, self._weight
        for expert in experts:
            uses[expert] += weight
            weight *= _NEXT_CHOICE
        self._weight *= self._growth ** len(experts)
        if self._weight > _LARGEST_WEIGHT:
            self._rescale()

    def pass_over(self, experts: Sequence[int]) -> None:
        self.touch(experts)

    def insert(self, expert: int) -> None:
        self._known[expert] = None

    def remove(self, expert: int) -> None:
        del self._known[expert]

    def coldest(self) -> Iterator[int]:
        return iter(sorted(self._known, key=self.uses.__getitem__))

    def __len__(self) -> int:
        return len(self._known)

    def _rescale(self) -> None:
        """Divide everything by the current weight, which keeps the order and avoids overflow."""
        for expert in self.uses:
            self.uses[expert] /= self._weight
        self._weight = 1.0
