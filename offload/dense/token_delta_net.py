"""A layer of Gated DeltaNet (Qwen3-Next, Qwen3.5) for one token of each of a few sequences, in one call."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_local.offload.dense.library_call import are_numbers, matrix_of, same_format
from moe_local.offload.dense.norm import epsilon_of
from moe_local.offload.dense.places import States
from moe_local.offload.dense.token_state_call import TokenStateCall, states_of, use_state_calls
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.native.library import DTYPES, DeltaNet, check, loaded_library
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


class TokenDeltaNet(TokenStateCall):
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

    @property
    def inputs_shape(self) -> tuple[int, int]:
        return _channels(self.shape), self.shape.taps

    @property
    def states_shape(self) -> tuple[int, int, int]:
        shape: _Shape = self.shape
        return shape.value_heads, shape.key_width, shape.value_width

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
        return _channels(shape) + shape.value_heads * of_head

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
    use_state_calls(model, TokenDeltaNet)


def _channels(shape: _Shape) -> int:
    return 2 * shape.key_heads * shape.key_width + shape.value_heads * shape.value_width
