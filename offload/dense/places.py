"""Where one token of each of a few sequences writes its keys and values, or its state."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import torch

from moe_local.offload.dense.token_calls import version_of
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

    @property
    def tokens(self) -> int:
        """n"""
        return len(self.lasts)

    @property
    def span(self) -> tuple[Any, ...]:
        """What a call depends on besides the tensors."""
        return self.firsts, self.lasts

    def fit(self, dtype: torch.dtype) -> bool:
        """Whether keys and values of this dtype can be written there."""
        return self.keys.dtype is self.values.dtype is dtype and max(self.lasts) < self.keys.shape[2]

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


class States(NamedTuple):
    """What a layer of linear attention keeps of n sequences, which a token of each overwrites."""

    inputs: torch.Tensor
    """[n, C, K], contiguous."""
    states: torch.Tensor
    """[n, Hv, Dk, Dv], contiguous."""

    @property
    def tokens(self) -> int:
        """n"""
        return len(self.inputs)

    @property
    def span(self) -> tuple[Any, ...]:
        """As that of Places, to which a state's tensors belong: where they lie, and how often they have been
        changed."""
        inputs, states = self
        return inputs.data_ptr(), states.data_ptr(), version_of(inputs), version_of(states)

    @property
    def are_watched(self) -> bool:
        """Whether torch counts changes of these tensors, as it does unless they are tensors of inference."""
        return not any(tensor.is_inference() for tensor in self)

    def note_change(self) -> None:
        """Let torch count a change of which it does not know."""
        if self.are_watched:
            torch.autograd.graph.increment_version(self)

    def rows(self) -> list[Sequence]:
        """As those of Places."""
        (inputs, a_row), (states, a_state) = (
            (x.data_ptr(), x.stride(0) * x.element_size()) for x in (self.inputs, self.states)
        )
        return [Sequence(inputs + i * a_row, states + i * a_state, 0, 0, 0) for i in range(self.tokens)]

    def sequences(self) -> ctypes.Array[Sequence]:
        """`rows` as an array."""
        return (Sequence * len(self.inputs))(*self.rows())


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a decoder layer, or of a part of one; None if there is none. Its name
    depends on the release of transformers, and on the model."""
    return next(
        (kwargs[name] for name in ("cache", "past_key_values", "cache_params") if name in kwargs), None
    )


class DirectLayer(Protocol):
    """A cache layer whose memory may be written and read in place."""

    def direct(self, mask: torch.Tensor | None) -> Places | None:
        """Where one new token of each sequence goes, if `mask` hides from it nothing else than the columns
        outside of its window and behind it; else None."""

    def usual_mask(self) -> torch.Tensor | None:
        """The mask with which the layer's attention is usually called for such tokens."""
