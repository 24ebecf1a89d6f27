"""A row of the key-value memory, copied to RAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_local.offload.engine.snapshots import Snapshot


@dataclass(frozen=True, slots=True)
class SavedRow:
    """The first `length` tokens of a row: keys, values, and states at some lengths. Owns its tensors."""

    length: int
    columns: Sequence[torch.Tensor]
    """One tensor for each of the slab's, with the row's first columns."""
    snapshots: Sequence[Snapshot] | None = None
    """By length, the last at `length`; None: no layer keeps a state."""

    def reusable(self, length: int) -> int:
        """How many tokens a row can have from it, if only its first `length` are wanted."""
        if self.snapshots is None:
            return length
        return max((each.length for each in self.snapshots if each.length <= length), default=0)

    @property
    def nbytes(self) -> int:
        states = (state for each in self.snapshots or () for state in each.states)
        return sum(tensor.nbytes for tensor in (*self.columns, *states))
