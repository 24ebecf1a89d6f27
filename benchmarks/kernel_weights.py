"""Weights for kernels.py: random bytes in the product's formats and kind of memory, larger than any cache."""

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
"""A set of copies is at least this many times as large as the last-level cache."""


class Copies:
    """At least `least` buffers of one layout, allocated as by the tiers, filled differently and used in turn.

    There are so many that a buffer has left the last-level cache by its next turn, if each turn reads
    `nbytes`.
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
    """The size of the largest cache that the system reports, or that of a large processor if it reports
    none."""
    levels = ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")
    known = [os.sysconf(name) for name in levels if name in os.sysconf_names]
    return max(known, default=0) or 64 * 2**20


def copies_beyond_cache(nbytes: int, least: int = LEAST_COPIES) -> int:
    """How many copies of `nbytes`, used in turn, evict each other from the last-level cache."""
    return max(least, -(-CACHES * last_cache_bytes() // nbytes))


def fill_nf4(buffer: torch.Tensor, layout: Layout) -> None:
    """Random weights of about 0.02, so that results stay finite; the speed does not depend on them."""
    fill_randomly(buffer)
    for spec in layout.tensors:
        matrix = nf4_matrix(buffer, layout, spec.name)
        matrix.absmax_scale.fill_(0.01)
        matrix.offset.fill_(0.04)


def fill_low(buffer: torch.Tensor, layout: Layout) -> None:
    """Random weights of q3 or q2, also of about 0.02."""
    fill_randomly(buffer)
    for spec in layout.tensors:
        low_matrix(buffer, layout, spec.name).row_scale.fill_(0.02 if layout.format == "q3" else 0.08)


def int8_layout(spec: TensorSpec) -> Layout:
    """A matrix of int8 with an fp16 scale for every 64 columns of a row, as in moe_native.h."""
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
    """Random weights of MXFP4 or FP8, of about 0.02, without codes of NaN."""
    fill_randomly(buffer)
    for segment in layout.segments:
        view = segment_view(buffer, segment)
        if segment.dtype == "float8_e4m3fn":
            view.view(torch.uint8).bitwise_and_(0xBF)
        elif segment.part == "scale":
            view.fill_(120 if segment.dtype == "uint8" else 0.05)


def fill_randomly(buffer: torch.Tensor) -> None:
    buffer.view(torch.int64).random_(-(2**63), None)
