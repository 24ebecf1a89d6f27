"""Least frequently used goes first; among equals the least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

HALF_LIFE_USES = 128
"""All counts of a layer are halved after this many uses in it (64 tokens at top-2, 16 at top-8)."""


class LFUPolicy:
    """Eviction order by number of uses, ties by last use.

    Counts outlive eviction, or an expert that comes and goes would start from nothing each time (1 to 4
    points of hit rate on recorded routes). But popularity belongs to a request, not to a model, so counts
    fade: they are halved every `HALF_LIFE_USES` uses. Without that, a change of topic costs 5 to 13 points.

    A use is O(1), an eviction O(n log n) over the n known experts: a stable sort of the order of last use.
    """

    __slots__ = ("_count", "_recent", "_uses")

    def __init__(self) -> None:
        self._count: dict[int, float] = {}
        """Faded uses of every expert ever known."""
        self._recent: OrderedDict[int, None] = OrderedDict()
        """The known experts by last use, the longest ago first."""
        self._uses = 0

    def touch(self, experts: Sequence[int]) -> None:
        count, move_to_end = self._count, self._recent.move_to_end
        for expert in experts:
            count[expert] += 1
            move_to_end(expert)
        self._fade(len(experts))

    def insert(self, expert: int) -> None:
        self._count[expert] = self._count.get(expert, 0) + 1
        self._recent[expert] = None
        self._fade(1)

    def remove(self, expert: int) -> None:
        del self._recent[expert]

    def coldest(self) -> Iterator[int]:
        return iter(sorted(self._recent, key=self._count.__getitem__))

    def __len__(self) -> int:
        return len(self._recent)

    def _fade(self, uses: int) -> None:
        self._uses += uses
        if self._uses >= HALF_LIFE_USES:
            self._uses = 0
            for expert, count in self._count.items():
                self._count[expert] = count / 2
