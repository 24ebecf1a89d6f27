"""What library calls for attention of single tokens have in common: when they replace a module's forward."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import Any, NamedTuple

import torch

from moe_local.offload.dense.library_call import LibraryCall
from moe_local.offload.dense.places import Places, cache_of
from moe_local.offload.dense.sink_attention import NAME as WITH_SINKS
from moe_local.offload.modeling.configs import attention_of
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import HALVES

FUSED = ("sdpa", WITH_SINKS)
"""Prefixes of the names of attention implementations that, like the library, return no scores."""


class Way(NamedTuple):
    """The form of the rotary embedding: see Attention in moe_native.h."""

    rotated: int
    rotation: int
    shared: bool

    @property
    def angles(self) -> int:
        """How many cosines the library reads for a token."""
        return self.rotated // 2 if self.shared else self.rotated


class AttentionCall(LibraryCall):
    """The library's call for one attention module."""

    def __init__(self, module: Any, shape: Any) -> None:
        super().__init__(module, shape)
        self._way = Way(0, HALVES, False)

    @abstractmethod
    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: Places) -> torch.Tensor:
        """x [n, 1, D], cos and sin [n, 1, angles], which it `takes` -> [n, 1, D]; writes keys and values.

        To be called only after `ready`.
        """

    @abstractmethod
    def takes(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether these tensors, with a row for each token, have the dtype, sizes and memory layout that the
        library reads."""

    def angles(self, given: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin from the module's `position_embeddings`; None if these are anything else."""
        return given if isinstance(given, tuple) else None

    def read_angles(self, kwargs: dict[str, Any], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The cos and sin that the library reads for so many tokens, of a call that has `places`."""
        given = self.angles(kwargs["position_embeddings"])
        assert given is not None
        return given

    def places(self, module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Places | None:
        """Where the keys and values of x [n, 1, D] go if the library can serve this call of the module, for
        which it is `ready` then; else None."""
        layers = getattr(cache_of(kwargs), "layers", ())
        layer: Any = layers[module.layer_idx] if module.layer_idx < len(layers) else None
        if not hasattr(layer, "direct") or not self.suits(module, x, kwargs):
            return None
        places: Places | None = layer.direct(kwargs.get("attention_mask"))
        if places is None or places.tokens != x.numel() // x.shape[-1] or not places.fit(x.dtype):
            return None
        return places if self.ready(module, x.dtype) else None

    def suits(self, module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the library can serve this call of the module once it is `ready`, if its keys and values
        have places."""
        tokens = x.numel() // x.shape[-1]
        if tokens > self.most_tokens or (tokens > 1 and x.shape[1] > 1) or torch.is_grad_enabled():
            return False
        if not x.is_cpu or torch.is_autocast_enabled("cpu") or module.training:
            return False
        if not str(attention_of(module.config)).startswith(FUSED):  # chosen to get scores
            return False
        angles = self.angles(kwargs.get("position_embeddings"))
        return angles is not None and self.takes(x, *angles)

    @abstractmethod
    def ways(self, cos: torch.Tensor) -> list[Way]:
        """The forms of the rotary embedding that the module may use."""

    @abstractmethod
    def history(self, positions: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of keys and values of one sequence with so many positions."""

    def reads_as(self, other: AttentionCall) -> bool:
        """Whether both read cosines and sines of one form."""
        return self._way.angles == other._way.angles

    def take(self, way: Way) -> None:
        """Use this form of the rotary embedding from now on."""
        self._way, self._guard = way, None


@cache
def direct(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls: AttentionCall = self._token_attention
        places = None if args else calls.places(self, hidden_states, kwargs)
        if places is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        cos, sin = calls.angles(kwargs["position_embeddings"])  # type: ignore[misc]
        return calls(hidden_states, cos, sin, places), None

    return stand_in(cls, direct, forward)
