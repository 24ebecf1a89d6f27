"""A view of all rows of the key-value slab, for one new token each, and the attention masks that it needs.

A row's token p lies in column p, so rows of different lengths need neither padding nor shifting: every row is
given as many columns as the longest one, and a mask hides from each row the columns that it must not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_masks_for_generate

from moe_local.offload.dense.places import Places
from moe_local.offload.modeling.names import cache_name

if TYPE_CHECKING:
    from moe_local.offload.engine.kv_slab import LayerStore

STATE_LAYERS = frozenset({"linear_attention", "mamba", "conv"})
"""Layer types that use a mask only for padding; there is none here, so they get no mask."""


class BatchPlaces:
    """Where the new tokens of rows 0 to n - 1 are written. Shared by all layers, set before each forward."""

    def __init__(self) -> None:
        self.columns = torch.empty(0, dtype=torch.long)
        """int64 [n] on the device: the column of each row's token, which is the row's length."""
        self.rows = torch.empty(0, dtype=torch.long)
        """int64 [n]: 0 to n - 1."""
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self.width = 0
        """Number of columns that the forward sees: the length of the longest row with its new token."""
        self.lens: list[int] = []
        """As `columns`."""
        self.windows: list[tuple[torch.Tensor, int | None]] = []
        """Masks that hide nothing else than what comes later or lies outside of a window, with its width."""

    def set(self, lens: Sequence[int], device: torch.device) -> None:
        self.lens, self.windows = list(lens), []
        self.columns = torch.tensor(lens, device=device)
        self.rows = torch.arange(len(lens), device=device)
        self.width = max(lens) + 1
        self._on = {device: (self.rows, self.columns)}

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`rows` and `columns` on a layer's device: with several cards, layers lie on different ones."""
        if device not in self._on:
            self._on[device] = self.rows.to(device), self.columns.to(device)
        return self._on[device]


class BatchLayer(DynamicLayer):  # type: ignore[misc]
    """The first rows of one layer, as transformers' attention modules see a cache layer."""

    def __init__(self, store: LayerStore, places: BatchPlaces) -> None:
        super().__init__()
        self._store = store
        self._places = places
        self.is_initialized = self.is_indexer_initialized = True
        self.is_sliding = False  # a window is only a mask here

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write one new token per row, [n, H, 1, D]; returns views of the first columns, [n, H, width, D]."""
        rows, columns = self._places.on(self._store.keys.device)
        self._store.keys[rows, :, columns] = key_states[:, :, 0]
        self._store.values[rows, :, columns] = value_states[:, :, 0]
        seen = slice(len(key_states)), slice(None), slice(self._places.width)
        return self._store.keys[seen], self._store.values[seen]

    def direct(self, mask: torch.Tensor | None) -> Places | None:
        """Where a caller that does not use `update` writes one new token per row; see DirectLayer."""
        lens, window = self._places.lens, self._store.window
        if not any(mask is known and window == width for known, width in self._places.windows):
            return None
        firsts = [0 if window is None else max(0, length - window + 1) for length in lens]
        return Places(self._store.keys, self._store.values, firsts, lens)

    def usual_mask(self) -> torch.Tensor | None:
        """See DirectLayer."""
        window = self._store.window
        return next((mask for mask, width in self._places.windows if width == window), None)

    def update_indexer(self, indexer_key_states: Any) -> Any:
        """Write one new index key per row, [n, 1, Di]; a view of the first columns, [n, width, Di]."""
        keys = self._store.indexer
        assert keys is not None, "this layer had no indexer when it was probed"
        rows, columns = self._places.on(keys.device)
        keys[rows, columns] = indexer_key_states[:, 0]
        return keys[: len(indexer_key_states), : self._places.width]

    def get_seq_length(self) -> int:
        return self._places.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many columns `update` will return, the first of them)."""
        return self._places.width, 0


class BatchMasks:
    """Makes the attention masks of a batch in the form that a model's forward takes.

    That is one tensor, or one per layer type, each [n, 1, 1, width]: bool (True: seen) for transformers'
    sdpa; numbers to add to scores for its eager attention and for moe-local's own attention functions.
    """

    def __init__(self, hf: Any, windows: Sequence[int | None]) -> None:
        """`windows`: the sliding window of each cache layer; None where a token sees all before it."""
        config = hf.config.get_text_config(decoder=True)
        self._added = config._attn_implementation != "sdpa"
        self._chunk = getattr(config, "attention_chunk_size", None)
        self._dtype = hf.get_input_embeddings().weight.dtype
        self._types = _mask_types(hf, config)
        types = getattr(config, "layer_types", None) or [None] * len(windows)
        self._windows = dict(zip(types, windows, strict=False))

    def make(self, places: BatchPlaces) -> Any:
        if self._types is None:
            return self._mask(next(iter(self._windows.values()), None), places, chunked=False)
        return {
            name: None
            if name in STATE_LAYERS
            else self._mask(self._windows.get(name), places, chunked=name == "chunked_attention")
            for name in self._types
        }

    def _mask(self, window: int | None, places: BatchPlaces, *, chunked: bool) -> torch.Tensor:
        key = torch.arange(places.width, device=places.columns.device)[None]
        query = places.columns[:, None]
        seen = key <= query
        if window is not None:
            seen &= key // window == query // window if chunked else key > query - window
        mask = seen[:, None, None]
        if self._added:
            least = torch.finfo(self._dtype).min
            zeros = torch.zeros(mask.shape, dtype=self._dtype, device=mask.device)
            mask = zeros.masked_fill(~mask, least)
        if not chunked:
            places.windows.append((mask, window))
        return mask


def _mask_types(hf: Any, config: Any) -> list[str] | None:
    """The layer types, if the model takes one mask for each; None if it takes one mask for all layers."""
    types = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in types:  # transformers 5.17 cannot make masks for these when asked as below
        return sorted(types)
    make = getattr(hf, "create_masks_for_generate", create_masks_for_generate)
    asked = make(
        config=hf.config,
        inputs_embeds=torch.empty(1, 2, 0),
        attention_mask=torch.tensor([[0, 1]]),
        position_ids=torch.tensor([[0, 1]]),
        **{cache_name(make): DynamicCache(config=config)},
    )
    if isinstance(asked, dict):
        return list(asked)
    return sorted(types) if STATE_LAYERS & types else None
