"""A layer of Gated DeltaNet (Qwen3-Next, Qwen3.5) for one token of each of a few sequences, in one call."""

from __future__ import annotations

import ctypes
import functools
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_local.offload.dense.library_call import LibraryCall, are_numbers, matrix_of, same_format
from moe_local.offload.dense.norm import epsilon_of
from moe_local.offload.dense.places import States, cache_of
from moe_local.offload.dense.token_calls import agrees_on_sizes, all_close, attempt, token_calls
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import DTYPES, DeltaNet, check, library, loaded_library
from moe_local.offload.system.threads import kernel_threads

BY_PART = {"qkv": "in_proj_qkv", "z": "in_proj_z", "b": "in_proj_b", "a": "in_proj_a"}
"""Qwen3.5's projections, and the fields of a DeltaNet that they fill."""
BY_KEY_HEAD = {"qkv": "in_proj_qkvz", "b": "in_proj_ba"}
"""Qwen3-Next's."""
OTHERS = {"conv1d", "norm", "out_proj"}
NUMBERS = {"A_log", "dt_bias"}
"""The other submodules and the parameters that such a layer has, and nothing else."""

STEP = 16
"""The width of values must be a multiple of it."""


class _Shape(NamedTuple):
    """As DeltaNet in moe_native.h."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: int
    epsilon: float
    by_key_head: int


class TokenDeltaNet(LibraryCall):
    """The library's call for one layer, whose states it overwrites."""

    FIRST = "in_proj_qkv", "in_proj_qkvz"

    def __call__(self, x: torch.Tensor, places: States) -> torch.Tensor:
        """x [n, 1, D] and places that it `takes` -> [n, 1, D]. To be called only after `ready`."""
        y = torch.empty_like(x)
        places.note_change()
        check(
            loaded_library().moe_delta_net(
                ctypes.byref(self._struct),
                x.data_ptr(),
                places.inputs.data_ptr(),
                places.states.data_ptr(),
                len(x),
                y.data_ptr(),
                None,
                rounding(self.activations, x.dtype),
                kernel_threads(),
            )
        )
        return y

    def takes(self, x: torch.Tensor, inputs: Any, states: Any) -> bool:
        """Whether these have the dtypes, sizes and memory layout that the library reads."""
        if not torch.is_tensor(inputs) or not torch.is_tensor(states):
            return False
        key_heads, value_heads, key_width, value_width, taps, *_ = self.shape
        rows, channels = len(x), 2 * key_heads * key_width + value_heads * value_width
        return (
            rows > 0
            and inputs.dtype is x.dtype
            and x.shape == (rows, 1, self._hidden)
            and inputs.shape == (rows, channels, taps)
            and states.dtype is torch.float32
            and states.shape == (rows, value_heads, key_width, value_width)
            and x.is_contiguous()
            and inputs.is_contiguous()
            and states.is_contiguous()
            and inputs.is_cpu
            and states.is_cpu
        )

    def places(self, module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> States | None:
        """The states that x [n, 1, D] overwrites if the library can serve this call of the module, for which
        it is `ready` then; else None."""
        if x.dim() != 3 or x.shape[1] != 1 or len(x) > self.most_tokens or not x.is_cpu:
            return None
        if module.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        places = states_of(kwargs, module.layer_idx) if overwrites_states(kwargs) else None
        if places is None or not self.takes(x, *places) or not self.ready(module, x.dtype):
            return None
        return places

    def states_ahead(self, index: int, x: torch.Tensor, kwargs: dict[str, Any]) -> States | None:
        """Those of layer `index` in the cache among the arguments of an earlier layer's call, if the library
        could serve this layer with x [n, 1, D], and their changes until its call are noticed; else None."""
        found = states_of(kwargs, index)
        if found is None or not found.are_watched or len(x) > self.most_tokens:
            return None
        return found if self.takes(x, *found) else None

    @property
    def left(self) -> int:
        """How many numbers the library leaves for a token that is to change its states later."""
        shape: _Shape = self.shape
        of_head = shape.key_width + shape.value_width + 1
        channels = 2 * shape.key_heads * shape.key_width + shape.value_heads * shape.value_width
        return channels + shape.value_heads * of_head

    def change(self, left: int, tokens: int, inputs: int, states: int) -> None:
        """Change the states of so many sequences as the library has left it to be done. Takes addresses."""
        struct = ctypes.byref(self._struct)
        check(loaded_library().moe_change_states(struct, left, tokens, inputs, states, kernel_threads()))

    def read(self, module: Any, dtype: torch.dtype) -> DeltaNet:
        projections = BY_KEY_HEAD if self.shape.by_key_head else BY_PART
        struct = DeltaNet(o=matrix_of(module.out_proj))
        for field, name in projections.items():
            setattr(struct, field, matrix_of(getattr(module, name)))
        for name, value in zip(_Shape._fields, self.shape, strict=True):
            setattr(struct, name, value)
        bias = module.conv1d.bias
        struct.convolution = module.conv1d.weight.data_ptr()
        struct.convolution_bias = None if bias is None else bias.data_ptr()
        struct.a_log, struct.dt_bias = module.A_log.data_ptr(), module.dt_bias.data_ptr()
        struct.norm, struct.dtype = module.norm.weight.data_ptr(), DTYPES[dtype]
        return struct

    @staticmethod
    def shape_of(module: Any, dtype: torch.dtype) -> _Shape | None:
        parts = {name for name, _ in module.named_children()}
        by_key_head = BY_KEY_HEAD["qkv"] in parts
        projections = BY_KEY_HEAD if by_key_head else BY_PART
        if parts != {*projections.values(), *OTHERS}:
            return None
        if {name for name, _ in module.named_parameters(recurse=False)} != NUMBERS:
            return None
        linears = [getattr(module, name) for name in (*projections.values(), "out_proj")]
        if not all(hasattr(linear, "in_features") for linear in linears) or not same_format(linears, dtype):
            return None
        if not isinstance(getattr(module, "activation", None), str):
            return None
        names = "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"
        sizes: list[Any] = [getattr(module, name, None) for name in names]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        key_heads, value_heads, key_width, value_width = sizes
        convolution, norm = module.conv1d, module.norm
        if type(convolution) is not nn.Conv1d or value_heads % key_heads or value_width % STEP:
            return None
        values, taps = value_heads * value_width, convolution.kernel_size[0]
        channels, hidden = 2 * key_heads * key_width + values, linears[0].in_features
        rows = [channels, values, value_heads, value_heads, hidden]
        if by_key_head:
            rows = [channels + values, 2 * value_heads, hidden]
        columns = [hidden] * len(projections) + [values]
        if [linear.out_features for linear in linears] != rows:
            return None
        if [linear.in_features for linear in linears] != columns:
            return None
        vectors = [
            (convolution.weight.flatten(), channels * taps),
            (getattr(norm, "weight", None), value_width),
        ]
        vectors += [(getattr(module, name), value_heads) for name in sorted(NUMBERS)]
        if convolution.bias is not None:
            vectors.append((convolution.bias, channels))
        if not all(are_numbers(vector, count, dtype) for vector, count in vectors):
            return None
        if {module.activation, getattr(norm, "activation", "silu")} - {"silu", "swish"}:
            return None
        epsilon = epsilon_of(norm)
        if not isinstance(epsilon, float) or convolution.weight.shape != (channels, 1, taps):
            return None
        return _Shape(key_heads, value_heads, key_width, value_width, taps, epsilon, int(by_key_head))


def use_token_delta_nets(model: Any) -> None:
    """Let the library compute, for one token of each of a few sequences, those layers of Gated DeltaNet of
    `model`, in CPU memory, that it is able to. Trials decide which these are.

    Runs a forward of one token, for which experts must return something.
    """
    if library() is None or model.device.type != "cpu":
        return
    first = TokenDeltaNet.FIRST
    found = [module for module in model.modules() if any(hasattr(module, name) for name in first)]
    for called, (args, arguments, *_) in (token_calls(model, found) if found else {}).items():
        module: Any = called
        if args or "hidden_states" not in arguments:
            continue
        calls = TokenDeltaNet.of(module, arguments["hidden_states"].dtype)
        if calls is not None and _agrees(module, calls, arguments):
            module._token_delta_net = calls
            cls: Any = type(module)
            module.__class__ = _direct(cls)


def _agrees(module: Any, calls: TokenDeltaNet, arguments: dict[str, Any]) -> bool:
    """Whether the library's call and the module give the same."""
    generator = torch.Generator().manual_seed(19)
    return agrees_on_sizes(lambda size: _agrees_at(module, calls, arguments, size, generator))


@torch.no_grad()
def _agrees_at(
    module: Any, calls: TokenDeltaNet, arguments: dict[str, Any], size: float, generator: torch.Generator
) -> bool:
    shape, dtype = arguments["hidden_states"].shape, arguments["hidden_states"].dtype
    x = size * torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    states = states_of(arguments, module.layer_idx)
    if states is None or not calls.takes(x, *states) or not calls.ready(module, dtype):
        return False
    for state in states:
        state.copy_(torch.randn(state.shape, generator=generator, dtype=torch.float32))
    mine = [state.clone() for state in states]
    wanted = attempt(module, **arguments | {"hidden_states": x, "attention_mask": None})
    if wanted is None:
        return False
    got = calls(x, States(*mine))
    pairs = [(got, wanted), *zip(mine, states, strict=True)]
    return all_close(pairs, calls.activations)


def overwrites_states(kwargs: dict[str, Any]) -> bool:
    """Whether a call of a layer for single tokens, with these arguments, makes each a part of its sequence's
    state."""
    return kwargs.get("attention_mask") is None and kwargs.get("cu_seq_lens_q") is None


def states_of(kwargs: dict[str, Any], index: int) -> States | None:
    """A layer's states of earlier tokens in the cache that it is called with, which the call would overwrite;
    None if there are none, or if they are to be kept."""
    layers = getattr(cache_of(kwargs), "layers", ())
    layer: Any = layers[index] if index < len(layers) else None
    if getattr(layer, "record_past", True) or not layer.has_previous_state[0]:
        return None
    return States(layer.conv_states[0], layer.recurrent_states[0])


@cache
def _direct(cls: Any) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls: TokenDeltaNet = self._token_delta_net
        places = None if args else calls.places(self, hidden_states, kwargs)
        if places is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        return calls(hidden_states, places)

    return stand_in(cls, _direct, forward)
