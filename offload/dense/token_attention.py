"""Attention of one token of each of a few sequences, from the projections to the output, in one call."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Any, NamedTuple

import torch

from moe_local.offload.dense.attention_call import AttentionCall, Way
from moe_local.offload.dense.library_call import are_numbers, matrix_of, same_format
from moe_local.offload.dense.norm import epsilon_of, is_shifted
from moe_local.offload.dense.places import Places
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.native.library import DTYPES, HALVES, NEIGHBOURS, Attention, check, loaded_library
from moe_local.offload.system.threads import kernel_threads

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

PARTS = {*PROJECTIONS, "q_norm", "k_norm"}
"""Submodules that an attention may have; one with others computes more than the library does."""


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


class TokenAttention(AttentionCall):
    """The library's call for one module of grouped-query attention."""

    FIRST = ("q_proj",)

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: Places) -> torch.Tensor:
        y = torch.empty_like(x)
        check(
            loaded_library().moe_attention(
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
        """Whether these tensors, with a row for each token, have one dtype, and the sizes and memory layout
        that the library reads."""
        angles = self._way.angles * (x.numel() // x.shape[-1])
        one_dtype = x.dtype is cos.dtype is sin.dtype and x.dtype in DTYPES
        contiguous = x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
        return (
            one_dtype and contiguous and cos.numel() == sin.numel() == angles and x.shape[-1] == self._hidden
        )

    def ways(self, cos: torch.Tensor) -> list[Way]:
        count = cos.shape[-1]
        rotations = HALVES, NEIGHBOURS
        ways = [Way(count, rotation, shared) for rotation, shared in product(rotations, (False, True))]
        ways += [Way(2 * count, rotation, True) for rotation in rotations]
        return [way for way in ways if way.rotated <= self.shape.width and way.rotated % 2 == 0]

    def history(self, positions: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape = 1, self.shape.kv_heads, positions, self.shape.width
        return shape, shape

    def read(self, module: Any, dtype: torch.dtype) -> Attention:
        struct = Attention()
        struct.q, struct.k, struct.v, struct.o = (matrix_of(getattr(module, name)) for name in PROJECTIONS)
        struct.heads, struct.kv_heads, struct.width, struct.gated, struct.epsilon, struct.shifted = self.shape
        struct.rotated, struct.rotation, struct.shared = self._way
        struct.scaling, struct.dtype = module.scaling, DTYPES[dtype]
        norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        struct.q_norm, struct.k_norm = (None if norm is None else norm.weight.data_ptr() for norm in norms)
        sinks = getattr(module, "sinks", None)
        struct.sinks = None if sinks is None else sinks.data_ptr()
        return struct

    @staticmethod
    def shape_of(module: Any, dtype: torch.dtype) -> _Shape | None:
        if not {name for name, _ in module.named_children()} <= PARTS:
            return None
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters.keys() <= {"sinks"} or not isinstance(getattr(module, "scaling", None), float):
            return None
        linears: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
        if not same_format(linears, dtype):
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
        epsilons: set[Any] = {epsilon_of(norm) for norm in norms}
        shifted = {is_shifted(norm) for norm in norms}
        weights = [getattr(norm, "weight", None) for norm in norms]
        if len(epsilons) > 1 or len(shifted) > 1 or None in epsilons:
            return None
        if not all(are_numbers(w, width, dtype) for w in weights):
            return None
        if not all(are_numbers(sinks, heads, dtype) for sinks in parameters.values()):
            return None
        gated, epsilon = q.out_features > o.in_features, epsilons.pop() if epsilons else 0.0
        return _Shape(heads, kv_heads, width, gated, epsilon, True in shifted)
