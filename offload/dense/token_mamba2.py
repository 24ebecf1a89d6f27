"""A layer of Mamba-2 (Nemotron 3, Granite 4) for one token of each of a few sequences, in one call."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_local.offload.dense.library_call import are_numbers, matrix_of, same_format
from moe_local.offload.dense.norm import epsilon_of
from moe_local.offload.dense.places import States
from moe_local.offload.dense.token_state_call import TokenStateCall, use_state_calls
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.native.library import DTYPES, Mamba2, check, loaded_library
from moe_local.offload.system.threads import kernel_threads

PARTS = {"in_proj", "conv1d", "norm", "out_proj"}
NUMBERS = {"A_log", "D", "dt_bias"}
"""The submodules and the parameters that such a layer has, and nothing else but its activation."""

STEP = 16
"""The size of a state must be a multiple of it."""


class _Shape(NamedTuple):
    """As Mamba2 in moe_native.h."""

    heads: int
    groups: int
    width: int
    states: int
    taps: int
    epsilon: float


class TokenMamba2(TokenStateCall):
    """The library's call for one layer, whose states it overwrites."""

    FIRST = ("in_proj",)

    def __call__(self, x: torch.Tensor, places: States) -> torch.Tensor:
        y = torch.empty_like(x)
        places.note_change()
        check(
            loaded_library().moe_mamba2(
                ctypes.byref(self._struct),
                x.data_ptr(),
                places.inputs.data_ptr(),
                places.states.data_ptr(),
                len(x),
                y.data_ptr(),
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
        return shape.heads, shape.width, shape.states

    def read(self, module: Any, dtype: torch.dtype) -> Mamba2:
        struct = Mamba2(**{"in": matrix_of(module.in_proj)}, out=matrix_of(module.out_proj))
        for name, value in zip(_Shape._fields, self.shape, strict=True):
            setattr(struct, name, value)
        bias = module.conv1d.bias
        struct.convolution = module.conv1d.weight.data_ptr()
        struct.convolution_bias = None if bias is None else bias.data_ptr()
        struct.a_log, struct.d = module.A_log.data_ptr(), module.D.data_ptr()
        struct.dt_bias, struct.norm = module.dt_bias.data_ptr(), module.norm.weight.data_ptr()
        struct.dtype = DTYPES[dtype]
        return struct

    @staticmethod
    def shape_of(module: Any, dtype: torch.dtype) -> _Shape | None:
        parts = {name for name, part in module.named_children() if part is not getattr(module, "act", None)}
        if parts != PARTS or {name for name, _ in module.named_parameters(recurse=False)} != NUMBERS:
            return None
        linears = [module.in_proj, module.out_proj]
        if not all(hasattr(linear, "in_features") for linear in linears) or not same_format(linears, dtype):
            return None
        names = "num_heads", "n_groups", "head_dim", "ssm_state_size"
        sizes: list[Any] = [getattr(module, name, None) for name in names]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        heads, groups, width, states = sizes
        convolution, norm = module.conv1d, module.norm
        if type(convolution) is not nn.Conv1d or heads % groups or states % STEP:
            return None
        epsilon, taps = epsilon_of(norm), convolution.kernel_size[0]
        if not isinstance(epsilon, float) or getattr(module, "activation", None) not in ("silu", "swish"):
            return None
        shape = _Shape(heads, groups, width, states, taps, epsilon)
        channels, answers, hidden = _channels(shape), heads * width, module.in_proj.in_features
        if [linear.out_features for linear in linears] != [answers + channels + heads, hidden]:
            return None
        if module.out_proj.in_features != answers or convolution.weight.shape != (channels, 1, taps):
            return None
        if getattr(norm, "group_size", answers // groups) != answers // groups:
            return None
        vectors = [(convolution.weight.flatten(), channels * taps), (getattr(norm, "weight", None), answers)]
        vectors += [(getattr(module, name), heads) for name in sorted(NUMBERS)]
        if convolution.bias is not None:
            vectors.append((convolution.bias, channels))
        return shape if all(are_numbers(vector, count, dtype) for vector, count in vectors) else None


def use_token_mamba2(model: Any) -> None:
    """Let the library compute, for one token of each of a few sequences, those layers of Mamba-2 of `model`,
    in CPU memory, that it is able to. Trials decide which these are.

    Runs a forward of one token, for which experts must return something.
    """
    use_state_calls(model, TokenMamba2)


def _channels(shape: _Shape) -> int:
    return shape.heads * shape.width + 2 * shape.groups * shape.states
