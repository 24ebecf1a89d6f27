"""The keys and values of all sequences: a tensor per layer, a row per sequence, a column per token.

    keys[row, head, column, dim]        token p of a sequence lies in column p, for as long as it stays

Nothing grows, moves or is padded while sequences decode: a new token is written in place, `shorten` changes
one integer, and a sliding window is a slice. There are three views of the slab: `row()`, one sequence and any
number of new tokens; `static_row()`, one sequence and one new token at fixed addresses; and `batch()`, one
new token for each of the first rows, for which the rows in use are kept contiguous, 0 to len(lens) - 1.

Letters: R rows, H key-value heads, C capacity, D width of a head, W sliding window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moe_local.offload.dense.places import Places
from moe_local.offload.engine.batch_view import BatchLayer, BatchPlaces
from moe_local.offload.engine.encoder_decoder import EncoderDecoder, Translation
from moe_local.offload.engine.saved_row import SavedRow
from moe_local.offload.engine.static_row import StaticLayer
from moe_local.offload.modeling.names import cache_name

# Later releases of transformers use this class for layers without a cache; 5.17 and 5.18 omit such layers.
DUMMY_LAYER: type | None = getattr(cache_utils, "DummyLayer", None)
SLAB_LAYERS = (DynamicLayer, cache_utils.DynamicSlidingWindowLayer, cache_utils.DynamicIndexedLayer)

SWAPPED = 4096
"""Columns that are exchanged at a time, so that two long rows need little memory beside their own."""


@dataclass(frozen=True, slots=True)
class LayerStore:
    """The memory of one layer. keys [R, H, C, Dk], values [R, H, C, Dv], indexer [R, C, Di] or None."""

    keys: torch.Tensor
    values: torch.Tensor
    indexer: torch.Tensor | None
    window: int | None
    """W: a token sees itself and the W - 1 before it. None: it sees all."""

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.keys
        yield self.values
        if self.indexer is not None:
            yield self.indexer


class RowLayer(DynamicLayer):  # type: ignore[misc]
    """One row of one layer, as transformers' attention modules see a cache layer."""

    def __init__(self, store: LayerStore, row: int, lens: list[int]) -> None:
        """`lens`: the slab's own list, not a copy. There is no reference to the slab, hence no cycle."""
        super().__init__()
        self._lens, self._row, self._window = lens, row, store.window
        self._keys = store.keys[row : row + 1]
        self._values = store.values[row : row + 1]
        self._indexer = None if store.indexer is None else store.indexer[row : row + 1]
        self.is_initialized = self.is_indexer_initialized = True
        self.is_sliding = store.window is not None
        if store.window is not None:
            self.sliding_window = store.window

    def _first_visible(self) -> int:
        """The first column that the next token may see."""
        return 0 if self._window is None else max(0, self._lens[self._row] - self._window + 1)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write q new tokens, [1, H, q, D]; returns views of the columns that they may see,
        [1, H, min(W - 1, length) + q, D]."""
        start, new = self._lens[self._row], key_states.shape[-2]
        self._keys.narrow(2, start, new).copy_(key_states)
        self._values.narrow(2, start, new).copy_(value_states)
        first = self._first_visible()
        visible = start + new - first
        return self._keys.narrow(2, first, visible), self._values.narrow(2, first, visible)

    def direct(self, mask: torch.Tensor | None) -> Places | None:
        """Where a caller that does not use `update` writes one new token; see DirectLayer."""
        first, last = self._first_visible(), self._lens[self._row]
        # transformers makes a mask once a window is full, though the columns before it are not among these
        if mask is not None and not (mask.shape == (1, 1, 1, last + 1 - first) and _hides_nothing(mask)):
            return None
        return Places(self._keys, self._values, [first], [last])

    def usual_mask(self) -> torch.Tensor | None:
        """See DirectLayer."""
        return None

    def update_indexer(self, indexer_key_states: Any) -> Any:
        """Write q new index keys, [1, q, Di]; returns a view of all index keys, [1, length + q, Di]."""
        assert self._indexer is not None, "this layer had no indexer when it was probed"
        start, new = self._lens[self._row], indexer_key_states.shape[1]
        self._indexer.narrow(1, start, new).copy_(indexer_key_states)
        return self._indexer.narrow(1, 0, start + new)

    def get_seq_length(self) -> int:
        return self._lens[self._row]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many columns `update` will return, the first of them)."""
        first = self._first_visible()
        return self._lens[self._row] + query_length - first, first


def _hides_nothing(mask: torch.Tensor) -> bool:
    """Whether a mask, of bools or of numbers that are added to scores, leaves everything in sight."""
    return bool((mask if mask.dtype is torch.bool else mask == 0).all())


class KVSlab:
    """Keys and values of `rows` sequences of up to `capacity` tokens, allocated once at full length.

    Owns its tensors. They are no inference tensors, even when made under inference_mode, and on a CPU the
    system provides their pages only when a token is first written. Columns that were not written are read
    only by static rows, before which the caller calls `clear`, and by batches.
    """

    can_batch = True
    can_copy = True
    needs_snapshots = False
    whole_prompt_only = False

    def __init__(self, probe: Any, rows: int, capacity: int) -> None:
        """`probe`: a cache that holds one token, whose layers show every shape, dtype and device."""
        assert can_slab(probe), "probe first: make_kv chooses OwnCaches for other layers"
        self.rows = rows
        self.capacity = capacity
        self.lens: list[int] = []
        with torch.inference_mode(False):
            self.layers = [self._allocate(layer) for layer in probe.layers]
        self._views = [Cache(layers=[self._view(store, row) for store in self.layers]) for row in range(rows)]
        self.places = BatchPlaces()
        self.windows = [None if store is None else store.window for store in self.layers]
        self._all_rows = Cache(layers=[self._batch_view(store) for store in self.layers])
        self._touched = [capacity] * rows
        """By row: columns from this one on are zero; those between the length and this one hold anything."""

    def _allocate(self, layer: Any) -> LayerStore | None:
        if getattr(layer, "keys", None) is None:
            return None
        indexer = getattr(layer, "indexer_keys", None)
        return LayerStore(
            keys=self._empty(layer.keys),
            values=self._empty(layer.values),
            indexer=None if indexer is None else self._empty(indexer),
            window=getattr(layer, "sliding_window", None),
        )

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.rows, *like.shape[1:-2], self.capacity, like.shape[-1])
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _view(self, store: LayerStore | None, row: int) -> Any:
        if store is not None:
            return RowLayer(store, row, self.lens)
        return empty_layer()

    def _batch_view(self, store: LayerStore | None) -> Any:
        return empty_layer() if store is None else BatchLayer(store, self.places)

    def join(self) -> int:
        assert len(self.lens) < self.rows, f"all {self.rows} rows are taken"
        self.lens.append(0)
        return len(self.lens) - 1

    def leave(self, row: int) -> None:
        last = len(self.lens) - 1
        length = self.lens[last]
        if row != last:
            self.lens[row] = 0
            self._touched[row] = max(self._touched[row], length)
            for tensor in self._tensors():
                tensor[row, ..., :length, :].copy_(tensor[last, ..., :length, :])
        self.lens[row] = length
        self.lens.pop()

    def swap(self, one: int, other: int) -> None:
        try:
            self._swap(one, other)
        except BaseException:  # some layers may be exchanged, and others not
            self.lens[one] = self.lens[other] = 0
            for row in (one, other):
                self.abort(row)
            raise

    def _swap(self, one: int, other: int) -> None:
        """As `swap`; where it raises, both rows hold anything."""
        length = max(self.lens[one], self.lens[other])
        for tensor, begin in itertools.product(self._tensors(), range(0, length, SWAPPED)):
            columns = slice(begin, min(begin + SWAPPED, length))
            first, second = tensor[one, ..., columns, :], tensor[other, ..., columns, :]
            held = first.clone()
            first.copy_(second)
            second.copy_(held)
        for row in (one, other):
            self._touched[row] = max(self._touched[row], length)
        self.lens[one], self.lens[other] = self.lens[other], self.lens[one]

    def row(self, row: int) -> Any:
        return self._views[row]

    def batch(self, count: int) -> Any:
        for row in range(count):
            self.clear(row)
        self.places.set(self.lens[:count], next(self._tensors()).device)
        return self._all_rows

    def static_row(
        self, row: int, columns: int, positions: Mapping[torch.device, torch.Tensor], length: torch.Tensor
    ) -> Any:
        """A Cache of one sequence with `columns` columns at fixed addresses, for forwards of one token each.

        `positions`: int64 [1] on each of `devices`, read by every forward: the column of its token. `length`:
        the same number, on the device where masks are made. Call `clear` before each forward. Not for models
        whose layers have an indexer.
        """
        assert not self.has_indexer
        layers, kinds = [], set()
        for store in self.layers:
            if store is None:
                layers.append(empty_layer())
                continue
            # transformers makes a mask from the length that the first layer of its kind (with or without a
            # window) reports, so that layer gets `length`; others are asked on their own device.
            position, windowed = positions[store.keys.device], store.window is not None
            says = position if windowed in kinds else length
            kinds.add(windowed)
            layers.append(StaticLayer(store, row, columns, position, says))
        return Cache(layers=layers)

    def mark(self, row: int) -> Callable[[], None]:
        """A function that undoes later forwards of the row without `advance`; may be called repeatedly.

        It does nothing here, since such a forward has only written after the row's length.
        """
        return lambda: None

    @property
    def devices(self) -> list[torch.device]:
        """The devices of the layers: one, or several cards."""
        return list(dict.fromkeys(tensor.device for tensor in self._tensors()))

    @property
    def has_indexer(self) -> bool:
        """Whether some layer's attention chooses columns with an indexer."""
        return any(store is not None and store.indexer is not None for store in self.layers)

    def clear(self, row: int) -> None:
        """Zero the columns after the row's length, so that a mask can hide them: NaN times 0 would be NaN."""
        length, touched = self.lens[row], self._touched[row]
        if length < touched:
            for tensor in self._tensors():
                tensor[row, ..., length:touched, :].zero_()
        self._touched[row] = length

    def advance(self, row: int, tokens: int) -> None:
        assert self.lens[row] + tokens <= self.capacity, f"row {row} is full"
        self.lens[row] += tokens
        self._touched[row] = max(self._touched[row], self.lens[row])

    def abort(self, row: int) -> None:
        """Keeps `lens[row]`: the failed forward has only written after it, in columns that may now hold
        anything."""
        self._touched[row] = self.capacity

    def chunk(self, row: int, todo: int, wanted: int) -> int:
        return min(todo, wanted)

    def snapshot(self, row: int) -> None:
        pass

    def reusable(self, row: int, length: int) -> int:
        return length

    def shorten(self, row: int, length: int) -> None:
        assert 0 <= length <= self.lens[row], f"row {row} has {self.lens[row]} tokens, not {length}"
        self.lens[row] = length

    def copy(self, one: int, other: int, length: int) -> None:
        begin = self.lens[other]
        assert begin <= length <= self.lens[one], f"row {one} has {self.lens[one]} tokens, not {length}"
        self._touched[other] = max(self._touched[other], length)
        for tensor in self._tensors():
            tensor[other, ..., begin:length, :].copy_(tensor[one, ..., begin:length, :])
        self.advance(other, length - begin)

    def saved_bytes(self, row: int) -> int:
        return sum(tensor[row, ..., : self.lens[row], :].nbytes for tensor in self._tensors())

    def save(self, row: int) -> SavedRow:
        length = self.lens[row]
        columns = []
        for tensor in self._tensors():
            held = torch.empty(tensor[row, ..., :length, :].shape, dtype=tensor.dtype)
            for part, head in zip(_heads(held), _heads(tensor[row]), strict=True):
                part.copy_(head[:length])
            columns.append(held)
        return SavedRow(length, columns)

    def load(self, row: int, saved: SavedRow, length: int) -> None:
        assert self.lens[row] == 0
        self._touched[row] = max(self._touched[row], length)
        for tensor, columns in zip(self._tensors(), saved.columns, strict=True):
            for head, part in zip(_heads(tensor[row]), _heads(columns), strict=True):
                head[:length].copy_(part[:length])
        self.advance(row, length)

    def _tensors(self) -> Iterator[torch.Tensor]:
        for store in self.layers:
            if store is not None:
                yield from store.tensors()

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def check_integrity(self) -> None:
        assert len(self.lens) <= self.rows
        assert all(0 <= length <= self.capacity for length in self.lens), self.lens
        assert all(length <= touched for length, touched in zip(self.lens, self._touched, strict=False))
        for tensor in self._tensors():
            assert tensor.shape[0] == self.rows, tensor.shape
            assert tensor.shape[-2] == self.capacity, tensor.shape
        for view in self._views:
            assert len(view.layers) == len(self.layers)


def _heads(columns: torch.Tensor) -> Iterable[torch.Tensor]:
    """Views [C, D] of a row's columns [H, C, D] or [C, D].

    The first columns of each lie in one piece. So torch copies them between VRAM and RAM as they are; for
    columns in several pieces it would take as much VRAM once more.
    """
    return columns if columns.dim() == 3 else (columns,)


def can_slab(probe: Any) -> bool:
    """Whether a KVSlab can hold every layer of a probed cache."""
    return all(map(slabbed, probe.layers))


def slabbed(layer: Any) -> bool:
    """Whether a probed cache layer keeps each token in its own column, or nothing at all."""
    if DUMMY_LAYER is not None and type(layer) is DUMMY_LAYER:
        return True
    return type(layer) in SLAB_LAYERS and getattr(layer, "indexer_position_ids", None) is None


def empty_layer() -> Any:
    """A cache layer that keeps nothing."""
    return (DUMMY_LAYER or DynamicLayer)()


def cache_argument(model: Any) -> str:
    """The name of the cache argument of the model's forward."""
    return cache_name(model.forward)


@torch.inference_mode()
def probe_cache(model: Any) -> Any:
    """A new DynamicCache of the model after one token; it shows what each layer keeps, and in which shape."""
    if isinstance(model, EncoderDecoder):
        cache: Any = Translation.fresh()
    else:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    embeddings = model.get_input_embeddings().weight
    zero = torch.zeros((1, 1), dtype=torch.long, device=embeddings.device)
    model(input_ids=zero, position_ids=zero, use_cache=True, **{cache_argument(model): cache})
    return cache
