"""What library calls for attention of single tokens have in common: when they replace a module's forward."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.linear import FEW_TOKENS, NativeLinear, QuantizedLinear
from moe_local.offload.dense.places import Places
from moe_local.offload.dense.sink_attention import NAME as WITH_SINKS
from moe_local.offload.kernels.cpu import plain_matrix
from moe_local.offload.modeling.configs import attention_of
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import DTYPES, HALVES, PLAIN, Matrix

FUSED = ("sdpa", WITH_SINKS)
"""Prefixes of the names of attention implementations that, like the library, return no scores."""

MOST_TOKENS = 16
"""Most tokens in a call with quantized weights. Up to the library's `most_in_registers`, which is 4 to 16,
each has the bits that it has alone."""


class Way(NamedTuple):
    """The form of the rotary embedding: see Attention in moe_native.h."""

    rotated: int
    rotation: int
    shared: bool

    @property
    def angles(self) -> int:
        """How many cosines the library reads for a token."""
        return self.rotated // 2 if self.shared else self.rotated


class AttentionCall:
    """The library's call for one attention module. It holds the addresses of the module's weights, which are
    checked before each call."""

    def __init__(self, module: Any, shape: Any, first: Any) -> None:
        """`shape`: what `shape_of` gives for the module; `first`: a linear layer that takes its input."""
        self._parts = list(module.named_children())
        self.shape = shape
        self._scaling = module.scaling
        self._way = Way(0, HALVES, False)
        self._struct: Any = None
        self._dtype: torch.dtype | None = None
        """The dtype of the inputs that the struct was made for."""
        self._guard: Guard | None = None
        self._hidden: int = first.in_features
        quantized = isinstance(first, QuantizedLinear)
        self.activations = first.activations if quantized else "native"
        self.most_tokens = MOST_TOKENS if quantized else FEW_TOKENS
        """For more tokens, separate calls are faster."""

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype) -> Self | None:
        """The call for a module with the structure that the library expects and inputs of `dtype`; None for
        others. That both compute the same is not checked here."""
        raise NotImplementedError

    @staticmethod
    def shape_of(module: Any, dtype: torch.dtype) -> Any:
        """What the library has to know of a module besides the addresses of its weights, for inputs of
        `dtype`; None if it cannot compute it."""
        raise NotImplementedError

    def read(self, module: Any, dtype: torch.dtype) -> Any:
        """The library's description of the module at its weights' present addresses."""
        raise NotImplementedError

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: Places) -> torch.Tensor:
        """x [n, 1, D], cos and sin [n, 1, angles], which it `takes` -> [n, 1, D]; writes keys and values.

        To be called only after `ready`.
        """
        raise NotImplementedError

    def takes(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether these tensors, with a row for each token, have the dtype, sizes and memory layout that the
        library reads."""
        raise NotImplementedError

    def angles(self, given: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin from the module's `position_embeddings`; None if these are anything else."""
        return given if isinstance(given, tuple) else None

    def ways(self, cos: torch.Tensor) -> list[Way]:
        """The forms of the rotary embedding that the module may use."""
        raise NotImplementedError

    def history(self, positions: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of keys and values of one sequence with so many positions."""
        raise NotImplementedError

    @property
    def struct(self) -> Any:
        """The library's description of the module. Valid after `ready`; a new one if weights have moved."""
        return self._struct

    def take(self, way: Way) -> None:
        """Use this form of the rotary embedding from now on."""
        self._way, self._guard = way, None

    def ready(self, module: Any, dtype: torch.dtype) -> bool:
        """Update the addresses of the module's weights, before a call with inputs of `dtype`.

        False if the module has changed: its parts were replaced or have hooks, or the library cannot read
        their weights.
        """
        if self._guard is not None and dtype is self._dtype and self._guard.holds():
            return True
        if any(module._modules.get(name) is not part for name, part in self._parts):
            return False
        guard = Guard(module, [part for _, part in self._parts])
        if not guard.holds() or self.shape_of(module, dtype) != self.shape:
            return False
        self._struct, self._dtype, self._guard = self.read(module, dtype), dtype, guard
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy."""
        return {**self.__dict__, "_struct": None, "_guard": None}


@cache
def direct(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        places = None if args else places_of(self, hidden_states, kwargs)
        if places is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        calls: AttentionCall = self._token_attention
        cos, sin = calls.angles(kwargs["position_embeddings"])  # type: ignore[misc]
        return calls(hidden_states, cos, sin, places), None

    return stand_in(cls, direct, forward)


def places_of(module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Places | None:
    """Where the tokens' keys and values go if the library can serve this call, for which it is `ready` then;
    else None."""
    calls: AttentionCall = module._token_attention
    tokens = x.numel() // x.shape[-1]
    if tokens > calls.most_tokens or (tokens > 1 and x.shape[1] > 1) or torch.is_grad_enabled():
        return None
    if not x.is_cpu or torch.is_autocast_enabled("cpu") or module.training:
        return None
    if not str(attention_of(module.config)).startswith(FUSED):  # chosen to get scores
        return None
    layers = getattr(kwargs.get("cache", kwargs.get("past_key_values")), "layers", ())
    layer: Any = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    angles = calls.angles(kwargs.get("position_embeddings"))
    if not hasattr(layer, "direct") or angles is None:
        return None
    places: Places | None = layer.direct(kwargs.get("attention_mask"))
    if places is None or len(places.lasts) != tokens or max(places.lasts) >= places.keys.shape[2]:
        return None
    if not x.dtype is places.keys.dtype is places.values.dtype:
        return None
    return places if calls.takes(x, *angles) and calls.ready(module, x.dtype) else None


def matrix_of(linear: Any) -> Matrix:
    """The library's description of a linear layer that it can read; see `same_format`."""
    return (
        linear.in_place() if isinstance(linear, QuantizedLinear) else plain_matrix(linear.weight, linear.bias)
    )


def same_format(linears: list[Any], dtype: torch.dtype) -> bool:
    """Whether the library can read these linear layers, which are of one format, and inputs of `dtype`."""
    return dtype in DTYPES and all(map(_is_readable, linears)) and len(set(map(_format, linears))) == 1


def are_numbers(weight: Any, count: int, dtype: torch.dtype) -> bool:
    """Whether the library can read a tensor [count] of this dtype."""
    return weight is not None and weight.shape == (count,) and weight.dtype is dtype and _is_plain(weight)


def epsilon_of(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _is_readable(linear: Any) -> bool:
    if isinstance(linear, QuantizedLinear):
        return bool(linear.weight.is_cpu)
    if type(linear) not in (nn.Linear, NativeLinear) or linear.weight.dtype not in PLAIN:
        return False
    bias: torch.Tensor | None = linear.bias
    return _is_plain(linear.weight) and (bias is None or (bias.dtype in DTYPES and _is_plain(bias)))


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.is_cpu and weight.is_contiguous()


def _format(linear: Any) -> Any:
    return linear.layout.format if isinstance(linear, QuantizedLinear) else linear.weight.dtype
