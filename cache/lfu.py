"""Least frequently used goes first, where uses long ago count less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

HALF_LIFE_USES = 144
"""A use counts half as much after this many later uses in the layer (72 tokens at top-2, 18 at top-8)."""

_NEXT_CHOICE = 0.94
"""Within a step each of the router's choices counts so much of the one before it, about as its weight does."""

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
        """Those of all others."""
        self._weight = 1.0
        self._growth: float = 2.0 ** (1 / HALF_LIFE_USES)

    def touch(self, experts: Sequence[int], absent: Sequence[int] = ()) -> None:
        if absent:
            self.pass_over(experts)
            return
        known, weight = self._known, self._weight
        for expert in experts:
            known[expert] += weight
            weight *= _NEXT_CHOICE
        self._step(len(experts))

    def pass_over(self, experts: Sequence[int]) -> None:
        weight = self._weight
        for expert in experts:
            uses = self._known if expert in self._known else self._forgotten
            uses[expert] = uses.get(expert, 0.0) + weight
            weight *= _NEXT_CHOICE
        self._step(len(experts))

    def _step(self, uses: int) -> None:
        self._weight *= self._growth**uses
        if self._weight > _LARGEST_WEIGHT:
            self._rescale()

    def uses(self, expert: int) -> float:
        """Faded uses of any expert, on a scale that changes from step to step."""
        uses = self._known.get(expert)
        return self._forgotten.get(expert, 0.0) if uses is None else uses

    def insert(self, expert: int) -> None:
        self._known[expert] = self._forgotten.pop(expert, 0.0)

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
