"""Attention of one token of each of a few sequences, from the projections to the output, in one call."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.linear import FEW_TOKENS, NativeLinear, QuantizedLinear
from moe_local.offload.dense.norm import is_shifted
from moe_local.offload.dense.sink_attention import NAME as WITH_SINKS
from moe_local.offload.kernels.cpu import plain_matrix, rounding
from moe_local.offload.modeling.configs import attention_of
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import (
    DTYPES,
    HALVES,
    PLAIN,
    Attention,
    Matrix,
    Sequence,
    check,
    library,
)
from moe_local.offload.system.threads import kernel_threads

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = ("sdpa", WITH_SINKS)
"""Prefixes of the names of attention implementations that, like the library, return no scores."""

MOST_TOKENS = 16
"""Most tokens in a call with quantized weights. Up to the library's `most_in_registers`, which is 4 to 16,
each has the bits that it has alone."""

PARTS = {*PROJECTIONS, "q_norm", "k_norm"}
"""Submodules that an attention may have; one with others computes more than the library does."""


class Places(NamedTuple):
    """Where the keys and values of one token of each of n sequences are written, and which columns of its row
    each token sees."""

    keys: torch.Tensor
    """[n or more, H, C, D]; C and D are contiguous."""
    values: torch.Tensor
    """As keys, and with the same strides."""
    firsts: list[int]
    """[n]: the first column that each token sees."""
    lasts: list[int]
    """[n]: each token's own column."""

    def rows(self) -> list[Sequence]:
        """The library's form of these places; the tensors have to outlive it."""
        keys, values, firsts, lasts = self
        row, head, nbytes = keys.stride(0), keys.stride(1), keys.element_size()
        key, value = keys.data_ptr(), values.data_ptr()
        return [
            Sequence(key + i * row * nbytes, value + i * row * nbytes, head, first, last)
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


class Way(NamedTuple):
    """The form of the rotary embedding: see Attention in moe_native.h."""

    rotated: int
    rotation: int
    shared: bool


class _Shape(NamedTuple):
    """What the library has to know of a module besides the addresses of its weights."""

    heads: int
    kv_heads: int
    width: int
    gated: bool
    """Whether q_proj also gives gates, by whose sigmoids the heads' outputs are multiplied."""
    epsilon: float
    shifted: bool
    """Whether norms multiply by 1 + weight."""


class TokenAttention:
    """The library's call for one attention module. It holds the addresses of the module's weights, which are
    checked before each call."""

    def __init__(self, module: Any, shape: _Shape) -> None:
        self._parts = list(module.named_children())
        self.shape = shape
        self._scaling = module.scaling
        self._way = Way(0, HALVES, False)
        self._struct = Attention()
        self._dtype: torch.dtype | None = None
        """The dtype of the inputs that the struct was made for."""
        self._guard: Guard | None = None
        linear = module.q_proj
        quantized = isinstance(linear, QuantizedLinear)
        self.activations = linear.activations if quantized else "native"
        self.most_tokens = MOST_TOKENS if quantized else FEW_TOKENS
        """For more tokens, separate calls are faster."""

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype) -> TokenAttention | None:
        """The call for a module with the structure that the library expects and inputs of `dtype`; None for
        others. That both compute the same is not checked here."""
        shape = _shape(module, dtype)
        return None if shape is None else cls(module, shape)

    @property
    def struct(self) -> Attention:
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
        if not guard.holds() or _shape(module, dtype) != self.shape:
            return False
        self._struct, self._dtype, self._guard = self._read(module, dtype), dtype, guard
        return True

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: Places) -> torch.Tensor:
        """x [n, 1, D], cos and sin [n, 1, angles], all of one dtype -> [n, 1, D]; writes keys and values.

        To be called only after `ready`.
        """
        lib = library()
        assert lib is not None
        y = torch.empty_like(x)
        check(
            lib.moe_attention(
                ctypes.byref(self._struct),
                x.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                places.sequences(),
                len(places.lasts),
                y.data_ptr(),
                rounding(self.activations, x.dtype),
                kernel_threads(),
            )
        )
        return y

    def takes(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether these tensors, with a row for each token, have the dtype, sizes and memory layout that the
        library reads."""
        angles = self._way.rotated // 2 if self._way.shared else self._way.rotated
        angles *= x.numel() // x.shape[-1]
        one_dtype = x.dtype is cos.dtype is sin.dtype and x.dtype in DTYPES
        contiguous = x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
        fitting = cos.numel() == sin.numel() == angles and x.shape[-1] == self._parts[0][1].in_features
        return one_dtype and contiguous and fitting

    def _read(self, module: Any, dtype: torch.dtype) -> Attention:
        struct = Attention()
        struct.q, struct.k, struct.v, struct.o = (_matrix(getattr(module, name)) for name in PROJECTIONS)
        struct.heads, struct.kv_heads, struct.width, struct.gated, struct.epsilon, struct.shifted = self.shape
        struct.rotated, struct.rotation, struct.shared = self._way
        struct.scaling, struct.dtype = self._scaling, DTYPES[dtype]
        norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        struct.q_norm, struct.k_norm = (None if norm is None else norm.weight.data_ptr() for norm in norms)
        sinks = getattr(module, "sinks", None)
        struct.sinks = None if sinks is None else sinks.data_ptr()
        return struct

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy."""
        return {**self.__dict__, "_struct": None, "_guard": None}


@cache
def direct(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        places = None if args else places_of(self, hidden_states, kwargs)
        if places is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        return self._token_attention(hidden_states, cos, sin, places), None

    return stand_in(cls, direct, forward)


def places_of(module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Places | None:
    """Where the tokens' keys and values go if the library can serve this call, for which it is `ready` then;
    else None."""
    calls: TokenAttention = module._token_attention
    tokens = x.numel() // x.shape[-1]
    if tokens > calls.most_tokens or (tokens > 1 and x.shape[1] > 1) or torch.is_grad_enabled():
        return None
    if not x.is_cpu or torch.is_autocast_enabled("cpu") or module.training:
        return None
    if not str(attention_of(module.config)).startswith(FUSED):  # chosen to get scores
        return None
    layers = getattr(kwargs.get("cache", kwargs.get("past_key_values")), "layers", ())
    layer: Any = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    angles = kwargs.get("position_embeddings")
    if not hasattr(layer, "direct") or not isinstance(angles, tuple):
        return None
    places: Places | None = layer.direct(kwargs.get("attention_mask"))
    if places is None or len(places.lasts) != tokens or max(places.lasts) >= places.keys.shape[2]:
        return None
    if not x.dtype is places.keys.dtype is places.values.dtype:
        return None
    return places if calls.takes(x, *angles) and calls.ready(module, x.dtype) else None


def _matrix(linear: Any) -> Matrix:
    return (
        linear.in_place() if isinstance(linear, QuantizedLinear) else plain_matrix(linear.weight, linear.bias)
    )


def _shape(module: Any, dtype: torch.dtype) -> _Shape | None:
    """The shape of a module with the structure that the library expects and inputs of `dtype`; else None."""
    if not {name for name, _ in module.named_children()} <= PARTS:
        return None
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters.keys() <= {"sinks"} or not isinstance(getattr(module, "scaling", None), float):
        return None
    linears: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
    if dtype not in DTYPES or not all(map(_is_readable, linears)) or len(set(map(_format, linears))) > 1:
        return None
    q, k, v, o = linears
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int) or width < 1 or o.in_features % width or k.out_features % width:
        return None
    heads, kv_heads = o.in_features // width, k.out_features // width
    if width % 16 or heads % kv_heads or v.out_features != k.out_features:
        return None
    if q.out_features not in (o.in_features, 2 * o.in_features):
        return None
    if not q.in_features == k.in_features == v.in_features == o.out_features:
        return None
    norms = [norm for norm in (getattr(module, name, None) for name in ("q_norm", "k_norm")) if norm]
    epsilons = {_epsilon(norm) for norm in norms}
    shifted = {is_shifted(norm) for norm in norms}
    weights = [getattr(norm, "weight", None) for norm in norms]
    if len(epsilons) > 1 or len(shifted) > 1 or None in epsilons:
        return None
    if not all(_are_numbers(w, width, dtype) for w in weights):
        return None
    if not all(_are_numbers(sinks, heads, dtype) for sinks in parameters.values()):
        return None
    gated, epsilon = q.out_features > o.in_features, epsilons.pop() if epsilons else 0.0
    return _Shape(heads, kv_heads, width, gated, epsilon, True in shifted)


def _is_readable(linear: Any) -> bool:
    if isinstance(linear, QuantizedLinear):
        return bool(linear.weight.is_cpu)
    if type(linear) not in (nn.Linear, NativeLinear) or linear.weight.dtype not in PLAIN:
        return False
    bias: torch.Tensor | None = linear.bias
    return _is_plain(linear.weight) and (bias is None or (bias.dtype in DTYPES and _is_plain(bias)))


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.is_cpu and weight.is_contiguous()


def _are_numbers(weight: Any, count: int, dtype: torch.dtype) -> bool:
    return weight is not None and weight.shape == (count,) and weight.dtype is dtype and _is_plain(weight)


def _format(linear: Any) -> Any:
    return linear.layout.format if isinstance(linear, QuantizedLinear) else linear.weight.dtype


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
