"""One cache object per sequence, for models that keep more than keys and values of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from moe_local.offload.engine.batch_view import BatchPlaces
from moe_local.offload.engine.saved_row import SavedRow

WHOLE_PROMPT_ONLY = frozenset({"jamba"})
"""Model types whose scan ignores the state of earlier tokens when it gets several (transformers 5.23)."""


class OwnCaches:
    """Replaces a KVSlab for layers that it does not support: each sequence has its own DynamicCache.

    Memory grows with the tokens. A failed forward leaves such a cache half written, so `abort` drops it and
    the sequence is computed again from its ids. No tokens can be cut off: a state cannot be rolled back.
    """

    can_batch = can_copy = needs_snapshots = False

    def __init__(self, config: Any, rows: int, capacity: int) -> None:
        self._config = config.get_text_config(decoder=True)
        self.whole_prompt_only = self._config.model_type in WHOLE_PROMPT_ONLY
        self.rows = rows
        self.capacity = capacity
        self.lens: list[int] = []
        self.places = BatchPlaces()
        self.windows: list[int | None] = []
        self._caches: list[Any] = []

    def _fresh(self) -> Any:
        return DynamicCache(config=self._config)

    def join(self) -> int:
        assert len(self.lens) < self.rows, f"all {self.rows} rows are taken"
        self.lens.append(0)
        self._caches.append(self._fresh())
        return len(self.lens) - 1

    def leave(self, row: int) -> None:
        length, cache = self.lens.pop(), self._caches.pop()
        if row < len(self.lens):
            self.lens[row], self._caches[row] = length, cache

    def swap(self, one: int, other: int) -> None:
        self.lens[one], self.lens[other] = self.lens[other], self.lens[one]
        self._caches[one], self._caches[other] = self._caches[other], self._caches[one]

    def batch(self, count: int) -> Any:
        raise AssertionError("caches of their own have no common view")

    def row(self, row: int) -> Any:
        return self._caches[row]

    def advance(self, row: int, tokens: int) -> None:
        assert self.lens[row] + tokens <= self.capacity, f"row {row} is full"
        self.lens[row] += tokens

    def abort(self, row: int) -> None:
        self.lens[row], self._caches[row] = 0, self._fresh()

    def chunk(self, row: int, todo: int, wanted: int) -> int:
        if self.whole_prompt_only:
            return todo if self.lens[row] == 0 else 1
        return min(todo, wanted)

    def snapshot(self, row: int) -> None:
        pass

    def reusable(self, row: int, length: int) -> int:
        return length if length == self.lens[row] and not self.whole_prompt_only else 0

    def copy(self, one: int, other: int, length: int) -> None:
        raise AssertionError("caches of this model's layers are not copied")

    def saved_bytes(self, row: int) -> int:
        return held_bytes(self._caches[row])

    def save(self, row: int) -> SavedRow:
        raise AssertionError("caches of this model's layers are not copied")

    def load(self, row: int, saved: SavedRow, length: int) -> None:
        raise AssertionError("caches of this model's layers are not copied")

    def shorten(self, row: int, length: int) -> None:
        assert length in (0, self.lens[row]), f"row {row} has {self.lens[row]} tokens, not {length}"
        if length == 0:
            self.abort(row)

    @property
    def nbytes(self) -> int:
        return sum(map(held_bytes, self._caches))

    def check_integrity(self) -> None:
        assert len(self.lens) == len(self._caches) <= self.rows
        assert all(0 <= length <= self.capacity for length in self.lens), self.lens


def held_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in _held(layer))


def _held(layer: Any) -> Iterator[torch.Tensor]:
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else (value,)
        yield from (part for part in parts if isinstance(part, torch.Tensor))
