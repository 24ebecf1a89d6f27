"""Least frequently used goes first; among equals the least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

USES_PER_EXPERT = 16
"""After this many uses per known expert all counts are halved: a new topic can displace an old one."""


class LFUPolicy:
    """Eviction order by number of uses since admission, ties by last use.

    An expert's count starts at 1 when it is admitted, grows by 1 with each use, and is forgotten when it
    is evicted. Popularity belongs to a request, not to a model, so counts fade: after `USES_PER_EXPERT`
    uses per known expert all of them are halved, rounding up.

    Counts lie in one OrderedDict in order of last use; a stable sort by count then is the eviction order.
    A use is O(1), an eviction O(n log n) over the experts of one layer (about 5 microseconds at 64).
    """

    __slots__ = ("_count", "_uses")

    def __init__(self) -> None:
        self._count: OrderedDict[int, int] = OrderedDict()
        self._uses = 0

    def touch(self, experts: Sequence[int]) -> None:
        count = self._count
        move_to_end = count.move_to_end
        for expert in experts:
            count[expert] += 1
            move_to_end(expert)
        self._age(len(experts))

    def insert(self, expert: int) -> None:
        self._count[expert] = 1
        self._age(1)

    def remove(self, expert: int) -> None:
        del self._count[expert]

    def coldest(self) -> Iterator[int]:
        return iter(sorted(self._count, key=self._count.__getitem__))

    def __len__(self) -> int:
        return len(self._count)

    def _age(self, uses: int) -> None:
        self._uses += uses
        if self._uses >= USES_PER_EXPERT * len(self._count):
            self._uses = 0
            for expert, count in self._count.items():
                self._count[expert] = (count + 1) // 2
