"""Evicts the least recently used expert first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence


class LRUPolicy:
    """Eviction order by last use or admission; within a step the router's first choice counts as used first.

    An OrderedDict from coldest to hottest: each change is O(1), and `coldest()` is a plain walk.
    """

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def touch(self, experts: Sequence[int], absent: Sequence[int] = ()) -> None:
        move_to_end = self._order.move_to_end
        for expert in experts:
            if expert not in absent:
                move_to_end(expert)

    def pass_over(self, experts: Sequence[int]) -> None:
        """Does nothing: an expert without a slot has no place in the order."""

    def insert(self, expert: int) -> None:
        self._order[expert] = None

    def remove(self, expert: int) -> None:
        del self._order[expert]

    def coldest(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
