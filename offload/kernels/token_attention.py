"""A token through a model's attention, from its projections to its output, in one call of the library."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from moe_local.offload.kernels.cpu import plain_matrix, rounding
from moe_local.offload.kernels.linear import NativeLinear, QuantizedLinear
from moe_local.offload.native.library import (
    DTYPES,
    HALVES,
    NEIGHBOURS,
    PLAIN,
    Attention,
    Matrix,
    Sequence,
    check,
    library,
)
from moe_local.offload.threads import kernel_threads

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
PARTS = {*PROJECTIONS, "q_norm", "k_norm"}
"""Modules that an attention may consist of; one with others does more than the library."""

HISTORY = 5
"""Earlier positions that an attention is tried with."""


class Place(NamedTuple):
    """Where a token's keys and values go, and which earlier ones it sees."""

    keys: torch.Tensor
    """[1, H, C, D], contiguous but for H's stride."""
    values: torch.Tensor
    first: int
    """The first column that is seen."""
    last: int
    """The column of the token."""


class DirectLayer(Protocol):
    """A cache layer whose memory may be written and read in place."""

    def place(self) -> Place: ...


def use_token_attention(model: Any) -> None:
    """Let the attention modules of `model`, in CPU memory, that the library can do run in it.

    For one token of one sequence whose cache layers are DirectLayers; for all else the modules are what they
    were. Which ones these are is found out by trying: nothing goes by the name of a model. Runs a forward of
    one token, and needs experts that answer something.
    """
    if library() is None or model.device.type != "cpu":
        return
    known: dict[Any, _Way | None] = {}
    for module, arguments in _calls(model):
        calls = TokenAttention.of(module)
        if calls is None:
            continue
        kind = _kind(module)
        if kind not in known:
            known[kind] = next(
                (way for way in _ways(arguments) if _agrees(module, calls, way, arguments)), None
            )
        way = known[kind]
        if way is not None:
            calls.take(way)
            module._token_attention = calls
            cls: Any = type(module)
            module.__class__ = _direct(cls)


class _Way(NamedTuple):
    """How positions turn a head: see moe_native.h's Attention."""

    rotated: int
    rotation: int
    shared: bool


class TokenAttention:
    """The library's call for one attention module. It holds addresses of the module's weights, checked anew
    at each call."""

    def __init__(self, module: Any, shape: tuple[int, int, int]) -> None:
        """`shape`: heads, heads of keys, width of a head."""
        self._linears = [getattr(module, name) for name in PROJECTIONS]
        self._norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        self._sinks = getattr(module, "sinks", None)
        self._struct = Attention()
        self._struct.heads, self._struct.kv_heads, self._struct.width = shape
        self._struct.scaling = module.scaling
        self._struct.epsilon = next((_epsilon(norm) for norm in self._norms if norm is not None), 0.0)
        self._addresses: list[int] = []
        linear = self._linears[0]
        self._activations = linear.activations if isinstance(linear, QuantizedLinear) else "native"

    @classmethod
    def of(cls, module: Any) -> TokenAttention | None:
        """For a module that is built as the library expects; whether it computes the same is not said."""
        if not {name for name, _ in module.named_children()} <= PARTS:
            return None
        parameters = {name for name, _ in module.named_parameters(recurse=False)}
        if not parameters <= {"sinks"} or not isinstance(getattr(module, "scaling", None), float):
            return None
        linears: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
        if not all(_is_readable(linear) for linear in linears):
            return None
        q, k, _v, o = linears
        width = getattr(module, "head_dim", None)
        if not isinstance(width, int) or q.out_features % width or k.out_features % width or width % 16:
            return None
        for norm in (getattr(module, name, None) for name in ("q_norm", "k_norm")):
            if norm is not None and (_epsilon(norm) is None or norm.weight.shape != (width,)):
                return None
        if q.in_features != o.out_features:
            return None
        return cls(module, (q.out_features // width, k.out_features // width, width))

    def take(self, way: _Way) -> None:
        """Turn heads in this way from now on."""
        self._struct.rotated, self._struct.rotation, self._struct.shared = way

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, place: Place) -> torch.Tensor:
        """x [1, 1, D], cos and sin [1, 1, angles], all of one dtype -> [1, 1, D]; writes key and value."""
        lib = library()
        assert lib is not None
        self._find(x.dtype)
        sequence = Sequence(
            place.keys.data_ptr(), place.values.data_ptr(), place.keys.stride(1), place.first, place.last
        )
        y = torch.empty_like(x)
        check(
            lib.moe_attention(
                ctypes.byref(self._struct),
                x.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                ctypes.byref(sequence),
                y.data_ptr(),
                rounding(self._activations, x.dtype),
                kernel_threads(),
            )
        )
        return y

    def _find(self, dtype: torch.dtype) -> None:
        """Take note of where the weights are now."""
        addresses = [linear.weight.data_ptr() for linear in self._linears]
        if addresses == self._addresses:
            return
        struct = self._struct
        struct.dtype = DTYPES[dtype]
        struct.q, struct.k, struct.v, struct.o = map(_matrix, self._linears)
        struct.q_norm, struct.k_norm = (None if n is None else n.weight.data_ptr() for n in self._norms)
        struct.sinks = None if self._sinks is None else self._sinks.data_ptr()
        self._addresses = addresses

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a model whose attention runs in the C++ library cannot be copied or pickled")


@cache
def _direct(cls: Any) -> Any:
    """A subclass of an attention's class: hooks and `isinstance` find what they look for."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        place = None if args else _place(self, hidden_states, kwargs)
        if place is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        return self._token_attention(hidden_states, cos, sin, place), None

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _place(module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Place | None:
    """Where the token's keys and values go, if this is a call for the library."""
    if x.numel() != x.shape[-1] or kwargs.get("attention_mask") is not None or torch.is_grad_enabled():
        return None
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not x.is_contiguous():
        return None
    if not module.config._attn_implementation.startswith("sdpa"):  # asked for to see what others see
        return None
    layers = getattr(kwargs.get("cache", kwargs.get("past_key_values")), "layers", ())
    layer: Any = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if not hasattr(layer, "place"):
        return None
    place: Place = layer.place()
    cos, sin = kwargs["position_embeddings"]
    one_dtype = x.dtype is cos.dtype is sin.dtype is place.keys.dtype is place.values.dtype
    return place if one_dtype and x.dtype in DTYPES else None


# Finding out what the library can do


def _calls(model: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The attention modules of `model` that are given angles, with the arguments they are called with."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args and isinstance(kwargs.get("position_embeddings"), tuple):
            calls.append((module, kwargs))

    candidates = [module for module in model.modules() if all(hasattr(module, name) for name in PROJECTIONS)]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in candidates]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _ways(arguments: dict[str, Any]) -> Iterator[_Way]:
    count = arguments["position_embeddings"][0].shape[-1]
    for rotation, shared in product((HALVES, NEIGHBOURS), (False, True)):
        yield _Way(count, rotation, shared)
    yield from (_Way(2 * count, rotation, True) for rotation in (HALVES, NEIGHBOURS))


def _kind(module: Any) -> tuple[Any, ...]:
    """What modules have in common that compute alike."""
    simple = (bool, int, float, str, type(None))
    numbers = ((k, v) for k, v in vars(module).items() if isinstance(v, simple) and k != "layer_idx")
    parts = (
        (name, type(part), getattr(part, "bias", None) is None) for name, part in module.named_children()
    )
    return (type(module), *sorted(numbers, key=str), *parts)


def _agrees(module: Any, calls: TokenAttention, way: _Way, arguments: dict[str, Any]) -> bool:
    """Whether the library's call gives what the module gives, on small and on large numbers.

    Large ones show what small ones hide: limits on queries and on scores. The position is said to be a far
    one, so that nothing but the angles may depend on it.
    """
    struct = calls._struct
    if way.rotated > struct.width or way.rotated % 2:
        return False
    calls.take(way)
    generator = torch.Generator().manual_seed(11)
    return all(_agrees_at(module, calls, arguments, size, generator) for size in (0.05, 1.0, 40.0))


def _agrees_at(
    module: Any, calls: TokenAttention, arguments: dict[str, Any], size: float, generator: torch.Generator
) -> bool:
    from transformers.cache_utils import DynamicCache

    x, (cos, _sin) = arguments["hidden_states"], arguments["position_embeddings"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(x.dtype)

    x, cos, sin = size * random(*x.shape), random(*cos.shape), random(*cos.shape)
    history = 1, calls._struct.kv_heads, HISTORY, calls._struct.width
    keys, values = size * random(*history), random(*history)
    cache, name = DynamicCache(), "cache" if "cache" in arguments else "past_key_values"
    cache.update(keys, values, module.layer_idx)
    changed = {"hidden_states": x, "position_embeddings": (cos, sin), name: cache, "attention_mask": None}
    changed |= {
        name: torch.full_like(arguments[name], 1000 * HISTORY)
        for name in ("position_ids", "cache_position")
        if arguments.get(name) is not None
    }
    room = torch.zeros(1, *history[1:2], 1, history[3], dtype=x.dtype)
    place = Place(torch.cat([keys, room], 2), torch.cat([values, room], 2), 0, HISTORY)
    with torch.no_grad():
        try:
            wanted = module(**arguments | changed)[0]
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        got = calls(x, cos, sin, place)
    layer = cache.layers[module.layer_idx]
    pairs = [(got, wanted), (place.keys, layer.keys), (place.values, layer.values)]
    return all(a.shape == b.shape and _close(a, b, calls._activations) for a, b in pairs)


def _close(got: torch.Tensor, wanted: torch.Tensor, activations: str) -> bool:
    allowed = 0.1 if activations == "int8" else {torch.float32: 1e-4}.get(wanted.dtype, 0.03)
    off = (got.float() - wanted.float()).norm()
    return bool(off <= allowed * wanted.float().norm())


def _matrix(linear: Any) -> Matrix:
    return (
        linear.in_place() if isinstance(linear, QuantizedLinear) else plain_matrix(linear.weight, linear.bias)
    )


def _is_readable(linear: Any) -> bool:
    if isinstance(linear, QuantizedLinear):
        return True
    return (
        type(linear) in (nn.Linear, NativeLinear)
        and linear.weight.dtype in PLAIN
        and linear.weight.is_contiguous()
    )


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
