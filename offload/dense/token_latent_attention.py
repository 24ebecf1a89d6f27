"""Latent attention (MLA) of one token of each of a few sequences in one call, without expanding the latents.

As in `latent_attention`, the rows of kv_b_proj are applied to a token's queries and to its weighted sum of
latents; here they are read in place, quantized or not, instead of being dequantized for every token.
"""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Any, NamedTuple

import torch

from moe_local.offload.dense.attention_call import AttentionCall, Way
from moe_local.offload.dense.library_call import are_numbers, matrix_of, same_format
from moe_local.offload.dense.norm import epsilon_of, is_shifted
from moe_local.offload.dense.once import once_for_all_layers
from moe_local.offload.dense.places import Places
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.native.library import (
    APART,
    DTYPES,
    HALVES,
    NEIGHBOURS,
    LatentAttention,
    check,
    loaded_library,
)
from moe_local.offload.system.threads import kernel_threads

DIRECT = {"q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
IN_TWO_STEPS = DIRECT - {"q_proj"} | {"q_a_proj", "q_a_layernorm", "q_b_proj"}
"""The submodules of a module whose queries come from its input, or from ranks between both."""

STEP = 16
"""Widths of latents and of rotated keys must be multiples of it."""


class _Shape(NamedTuple):
    """As LatentAttention in moe_native.h."""

    heads: int
    latent: int
    plain: int
    rotated: int
    value: int
    q_epsilon: float
    kv_epsilon: float


class TokenLatentAttention(AttentionCall):
    """The library's call for one module of latent attention. Its cache holds the latents as keys, [n, 1, C,
    latent], and the rotated keys as values, [n, 1, C, rotated], as transformers' does."""

    FIRST = ("kv_a_proj_with_mqa",)

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: Places) -> torch.Tensor:
        y, tokens = torch.empty_like(x), len(places.lasts)
        cos, sin = _floats(cos, sin, tokens, self._way.angles)
        check(
            loaded_library().moe_latent_attention(
                ctypes.byref(self._struct),
                x.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                places.sequences(),
                tokens,
                y.data_ptr(),
                rounding(self.activations, x.dtype),
                kernel_threads(),
            )
        )
        return y

    def takes(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether x has the dtype, size and memory layout that the library reads, and each token has at least
        as many angles, of any dtype."""
        if x.dtype not in DTYPES or not x.is_contiguous() or x.shape[-1] != self._hidden:
            return False
        rows = x.shape[:-1]
        fitting = all(y.shape[:-1] == rows and y.shape[-1] >= self._way.angles for y in (cos, sin))
        return fitting and cos.is_cpu and sin.is_cpu

    def angles(self, given: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """DeepSeek-V2's angles are complex numbers."""
        return _parts(given) if torch.is_tensor(given) and given.is_complex() else super().angles(given)

    def read_angles(self, kwargs: dict[str, Any], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = super().read_angles(kwargs, tokens)
        return _floats(cos, sin, tokens, self._way.angles)

    def ways(self, cos: torch.Tensor) -> list[Way]:
        rotated, count = self.shape.rotated, cos.shape[-1]
        rotations = HALVES, NEIGHBOURS, APART
        return [
            way
            for rotation, shared in product(rotations, (False, True))
            if (way := Way(rotated, rotation, shared)).angles <= count
        ]

    def history(self, positions: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (1, 1, positions, self.shape.latent), (1, 1, positions, self.shape.rotated)

    def read(self, module: Any, dtype: torch.dtype) -> LatentAttention:
        struct = LatentAttention()
        q, q_norm = _queries(module)
        struct.kv_a, struct.kv_b, struct.o = map(matrix_of, _keys(module))
        if len(q) > 1:
            struct.q_a, struct.q_b = map(matrix_of, q)
            struct.q_norm = q_norm.weight.data_ptr()
        else:
            struct.q_b = matrix_of(q[0])
        struct.kv_norm = module.kv_a_layernorm.weight.data_ptr()
        for name, value in zip(_Shape._fields, self.shape, strict=True):
            setattr(struct, name, value)
        _, struct.rotation, struct.shared = self._way
        struct.scaling, struct.dtype = module.scaling, DTYPES[dtype]
        return struct

    @staticmethod
    def shape_of(module: Any, dtype: torch.dtype) -> _Shape | None:
        if {name for name, _ in module.named_children()} not in (DIRECT, IN_TWO_STEPS):
            return None
        if any(True for _ in module.parameters(recurse=False)):
            return None
        if not isinstance(getattr(module, "scaling", None), float):
            return None
        names = "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
        sizes: list[Any] = [getattr(module, name, None) for name in names]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        (q, q_norm), (kv_a, kv_b, o) = _queries(module), _keys(module)
        if not same_format([*q, kv_a, kv_b, o], dtype) or kv_b.bias is not None:
            return None
        latent, plain, rotated, value = sizes
        if latent % STEP or rotated % STEP or kv_b.out_features % (plain + value):
            return None
        heads = kv_b.out_features // (plain + value)
        wanted = [(latent + rotated, kv_a.in_features), (heads * (plain + value), latent)]
        wanted += [(kv_a.in_features, heads * value), (heads * (plain + rotated), q[-1].in_features)]
        if [(each.out_features, each.in_features) for each in (kv_a, kv_b, o, q[-1])] != wanted:
            return None
        if q[0].in_features != kv_a.in_features or (len(q) > 1 and q[0].out_features != q[1].in_features):
            return None
        norms = [(module.kv_a_layernorm, latent)]
        if q_norm is not None:
            norms.append((q_norm, q[-1].in_features))
        epsilons: list[Any] = [epsilon_of(norm) for norm, _ in norms]
        if None in epsilons or any(is_shifted(norm) for norm, _ in norms):
            return None
        if not all(are_numbers(getattr(norm, "weight", None), width, dtype) for norm, width in norms):
            return None
        return _Shape(heads, latent, plain, rotated, value, epsilons[-1], epsilons[0])


@once_for_all_layers
def _parts(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return angles.real, angles.imag


@once_for_all_layers
def _floats(
    cos: torch.Tensor, sin: torch.Tensor, tokens: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` cosines and sines of each token in fp32, [tokens, count]."""
    first, second = (x.reshape(tokens, -1)[:, :count].float().contiguous() for x in (cos, sin))
    return first, second


def _queries(module: Any) -> tuple[list[Any], Any]:
    """The linear layers from the input to the queries, and the norm between two of them or None."""
    if getattr(module, "q_b_proj", None) is None:
        return [module.q_proj], None
    return [module.q_a_proj, module.q_b_proj], module.q_a_layernorm


def _keys(module: Any) -> tuple[Any, Any, Any]:
    return module.kv_a_proj_with_mqa, module.kv_b_proj, module.o_proj
