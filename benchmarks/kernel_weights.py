"""Weights for kernels.py: random bytes in the product's formats and memory, beyond the last cache."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from moe_local.offload.quantize.layout import Layout, TensorSpec, make_layout
from moe_local.offload.quantize.low import low_matrix
from moe_local.offload.quantize.nf4 import nf4_matrix
from moe_local.offload.quantize.views import segment_view
from moe_local.offload.tiers.arena import HostArena

LEAST_COPIES = 4
CACHES = 4
"""How many times the last cache a set of copies fills at least."""


class Copies:
    """Buffers of one layout, `least` at least, as the tiers allocate them, filled differently, used in turn.

    By its next turn, a buffer of which `nbytes` are read has left the last cache.
    """

    def __init__(
        self, layout: Layout, nbytes: int, fill: Callable[[torch.Tensor, Layout], None], least: int = 1
    ) -> None:
        self.layout = layout
        count = max(least, copies_beyond_cache(nbytes))
        self._arena = HostArena([count], [layout.nbytes])  # keeps the memory
        self.buffers = [self._arena.buffer(0, slot) for slot in range(count)]
        for buffer in self.buffers:
            fill(buffer, layout)


def last_cache_bytes() -> int:
    """Of the largest cache that the system names; a large processor's where it names none."""
    levels = ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")
    known = [os.sysconf(name) for name in levels if name in os.sysconf_names]
    return max(known, default=0) or 64 * 2**20


def copies_beyond_cache(nbytes: int, least: int = LEAST_COPIES) -> int:
    """How many copies of `nbytes` take so long to come round that the last cache has forgotten the first."""
    return max(least, -(-CACHES * last_cache_bytes() // nbytes))


def fill_nf4(buffer: torch.Tensor, layout: Layout) -> None:
    """Random weights of about 0.02: the speed does not depend on them, and results stay finite."""
    fill_randomly(buffer)
    for spec in layout.tensors:
        matrix = nf4_matrix(buffer, layout, spec.name)
        matrix.absmax_scale.fill_(0.01)
        matrix.offset.fill_(0.04)


def fill_low(buffer: torch.Tensor, layout: Layout) -> None:
    """Random weights of q3 or q2, of about 0.02 as well."""
    fill_randomly(buffer)
    for spec in layout.tensors:
        low_matrix(buffer, layout, spec.name).row_scale.fill_(0.02 if layout.format == "q3" else 0.08)


def int8_layout(spec: TensorSpec) -> Layout:
    """A matrix of bytes with an fp16 scale for 64 columns of a row; moe_native.h."""
    rows, cols = spec.shape
    parts = [(spec.name, "q", "int8", spec.shape), (spec.name, "scale", "float16", (rows, -(-cols // 64)))]
    return make_layout("int8", [spec], parts)


def fill_int8(buffer: torch.Tensor, layout: Layout) -> None:
    fill_randomly(buffer)
    for segment in layout.segments:
        view = segment_view(buffer, segment)
        view.clamp_(min=-127) if segment.part == "q" else view.fill_(0.0003)


def int8_weights(buffer: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The matrix in fp32."""
    q, scale = (segment_view(buffer, segment) for segment in layout.segments)
    return q.float().mul_(scale.float().repeat_interleave(64, dim=1)[:, : q.shape[1]])


def fill_micro(buffer: torch.Tensor, layout: Layout) -> None:
    """Random weights of MXFP4 or FP8, of about 0.02; no code of NaN."""
    fill_randomly(buffer)
    for segment in layout.segments:
        view = segment_view(buffer, segment)
        if segment.dtype == "float8_e4m3fn":
            view.view(torch.uint8).bitwise_and_(0xBF)
        elif segment.part == "scale":
            view.fill_(120 if segment.dtype == "uint8" else 0.05)


def fill_randomly(buffer: torch.Tensor) -> None:
    buffer.view(torch.int64).random_(-(2**63), None)
