"""Where one token of each of a few sequences writes its keys and values."""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Protocol

import torch

from moe_local.offload.native.library import Sequence


class Places(NamedTuple):
    """Where the keys and values of one token of each of n sequences are written, and which columns of its row
    each token sees."""

    keys: torch.Tensor
    """[n or more, H, C, D]; C and D are contiguous."""
    values: torch.Tensor
    """As keys; D may be another."""
    firsts: list[int]
    """[n]: the first column that each token sees."""
    lasts: list[int]
    """[n]: each token's own column."""

    def rows(self) -> list[Sequence]:
        """The library's form of these places; the tensors have to outlive it."""
        keys, values, firsts, lasts = self
        head, nbytes = keys.stride(1), keys.element_size()
        key_row, value_row = keys.stride(0) * nbytes, values.stride(0) * nbytes
        key, value = keys.data_ptr(), values.data_ptr()
        return [
            Sequence(key + i * key_row, value + i * value_row, head, first, last)
            for i, (first, last) in enumerate(zip(firsts, lasts, strict=True))
        ]

    def sequences(self) -> ctypes.Array[Sequence]:
        """`rows` as an array."""
        return (Sequence * len(self.lasts))(*self.rows())


class DirectLayer(Protocol):
    """A cache layer whose memory may be written and read in place."""

    def direct(self, mask: torch.Tensor | None) -> Places | None:
        """Where one new token of each sequence goes, if `mask` hides from it nothing else than the columns
        outside of its window and behind it; else None."""
