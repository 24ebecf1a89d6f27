"""A row of the key-value slab whose addresses and shapes stay the same from token to token.

CUDA graphs need this. One new token is written to the column that a tensor on the device gives, and attention
reads a fixed number of columns; a mask hides those after the token. transformers makes that mask on the
device, from the same tensor, as it does for its own static caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from moe_local.offload.engine.kv_slab import LayerStore

FEWEST_COLUMNS = 256
"""With fewer columns, attention would not become so much faster that another graph were worth it."""


def static_columns(length: int, capacity: int) -> int:
    """Columns for the step after which a row has `length` tokens: 2^n or 1.5 * 2^n, or the capacity.

    Depends only on the length and capacity, so that a token is computed in the same way in every run.
    """
    columns = FEWEST_COLUMNS
    while columns < length:
        columns = columns * 3 // 2 if columns & (columns - 1) == 0 else columns // 3 * 4
    return min(columns, capacity)


class StaticLayer(DynamicLayer):  # type: ignore[misc]
    """One row of one layer: its first `columns` columns, for one new token at a time.

    All of these columns must be finite, since a hidden column is multiplied by zero and not left out.
    """

    is_compileable = True
    """Tells transformers to make the mask always, and on the device."""

    def __init__(
        self, store: LayerStore, row: int, columns: int, position: torch.Tensor, length: torch.Tensor
    ) -> None:
        """`position`: int64 [1] on the layer's device, the column of the new token; `length`: the same
        number, on the device where `get_seq_length` is used. Both are held, not copied."""
        super().__init__()
        self._keys = store.keys[row : row + 1].narrow(2, 0, columns)
        self._values = store.values[row : row + 1].narrow(2, 0, columns)
        self._position = position
        self._length = length.view(())
        self.is_initialized = True
        self.is_sliding = store.window is not None
        if store.window is not None:
            self.sliding_window = store.window

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write one new token, [1, H, 1, D]; returns views of all columns, [1, H, columns, D]."""
        self._keys.index_copy_(2, self._position, key_states)
        self._values.index_copy_(2, self._position, value_states)
        return self._keys, self._values

    def get_seq_length(self) -> Any:
        """Tokens before the new one, on a device: int64 []."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many columns `update` will return, the first of them)."""
        return self._keys.shape[2], 0
