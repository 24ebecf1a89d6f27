"""Evicts the expert first that was admitted first, regardless of use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class FIFOPolicy:
    """Eviction order by admission; use changes nothing. Other policies are measured against this one."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: dict[int, None] = {}

    def touch(self, experts: Sequence[int], absent: Sequence[int] = ()) -> None:
        """Does nothing: the order is that of admission."""

    def pass_over(self, experts: Sequence[int]) -> None:
        """Does nothing."""

    def insert(self, expert: int) -> None:
        self._order[expert] = None

    def remove(self, expert: int) -> None:
        del self._order[expert]

    def coldest(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
