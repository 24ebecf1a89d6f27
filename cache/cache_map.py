"""A snapshot of a cache: the state of every expert of every layer at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from moe_local.cache.expert_cache import ExpertCache


class Cell(IntEnum):
    """The state of an expert. Where one cell stands for several experts, the highest value is shown."""

    ABSENT = 0
    RESIDENT = 1
    LOADING = 2
    USED = 3
    """Needed since the last look, and resident at the time of that look."""
    MISSED = 4
    """Needed since the last look, and not resident at the time of that look."""


@dataclass(frozen=True, slots=True)
class CacheMap:
    """`cells[layer][expert]`."""

    cells: tuple[tuple[Cell, ...], ...]

    def shrunk(self, rows: int, columns: int) -> tuple[tuple[int, tuple[Cell, ...]], ...]:
        """Rows (first layer, cells) of a smaller map, of at most `rows` rows and `columns` columns.

        Each cell has the highest value of those that it stands for.
        """
        layers = len(self.cells)
        height = max(1, -(-layers // max(1, rows)))
        width = max(1, -(-max(map(len, self.cells), default=0) // max(1, columns)))
        shrunk = []
        for first in range(0, layers, height):
            group = self.cells[first : first + height]
            most = max(map(len, group))
            row = tuple(
                max(cell for line in group for cell in line[left : left + width])
                for left in range(0, most, width)
            )
            shrunk.append((first, row))
        return tuple(shrunk)


class CacheView:
    """Takes snapshots of a cache, and marks which experts were used or missed between two of them."""

    def __init__(self, cache: ExpertCache, num_experts: Sequence[int]) -> None:
        """`num_experts[layer]`: the experts of each layer."""
        self._cache = cache
        self._num_experts = tuple(num_experts)
        self._counts: Sequence[Sequence[int]] | None = None
        self._residents = self._look()

    def look(self, counts: Sequence[Sequence[int]] | None = None) -> CacheMap:
        """The cache now. `counts[layer][expert]`: how often each expert was chosen so far, to tell which were
        used or missed since the last look; None: nothing is marked so."""
        cells = []
        residents = self._look()
        for layer, experts in enumerate(self._num_experts):
            row = [Cell.ABSENT] * experts
            for expert in residents[layer]:
                row[expert] = Cell.RESIDENT
            for expert in self._cache.loading(layer):
                row[expert] = Cell.LOADING
            if counts is not None and self._counts is not None:
                for expert, (now, before) in enumerate(zip(counts[layer], self._counts[layer], strict=True)):
                    if now > before:
                        row[expert] = Cell.USED if expert in self._residents[layer] else Cell.MISSED
            cells.append(tuple(row))
        self._counts, self._residents = counts, residents
        return CacheMap(tuple(cells))

    def _look(self) -> list[frozenset[int]]:
        return [frozenset(self._cache.residents(layer)) for layer in range(len(self._num_experts))]
