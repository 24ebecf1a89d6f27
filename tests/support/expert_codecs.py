"""Codecs of all formats that kernels read, NVFP4 among them, which the product only reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_local.offload.quantize import nvfp4
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec, make_layout
from moe_local.offload.quantize.stored import StoredDecoder
from moe_local.offload.quantize.views import views_of
from support import published_floats


class Nvfp4Codec(StoredDecoder):
    """Matrices as publishers store them, with a second scale for each half of the rows; biases in bf16."""

    def __init__(self, second: str = nvfp4.FACTOR) -> None:
        """`second`: nvfp4.FACTOR as Model Optimizer has it, or DIVISOR as compressed-tensors does."""
        self._second = second

    def layout(self, tensors: Sequence[TensorSpec]) -> Layout:
        parts = []
        for name, shape in ((tensor.name, tensor.shape) for tensor in tensors):
            if len(shape) == 1:
                parts.append((name, "values", "bfloat16", shape))
                continue
            rows, cols = shape
            parts.append((name, "q", "uint8", (rows, cols // 2)))
            parts.append((name, self._second, "float32", (2,)))
            parts.append((name, "scale", "float8_e4m3fn", (rows, cols // nvfp4.BLOCK)))
        return make_layout("nvfp4", tensors, parts)

    def encode(self, tensors: Mapping[str, torch.Tensor], layout: Layout, out: torch.Tensor) -> None:
        for name, weight in tensors.items():
            parts = views_of(out, layout, name)
            if "values" in parts:
                parts["values"].copy_(weight)
                continue
            divides = self._second == nvfp4.DIVISOR
            halves = (published_floats.nvfp4(name, half, divides=divides)[0] for half in weight.chunk(2))
            each = zip(*(half.values() for half in halves), strict=True)
            for part, found in zip(("q", "scale", self._second), each, strict=True):
                parts[part].copy_(torch.cat([half.reshape(-1) for half in found]).view_as(parts[part]))


def expert_codec(format: str) -> Any:
    """The codec of a format, or of "nvfp4" and, with dividing second scales, "nvfp4, divided"."""
    seconds = {"nvfp4": nvfp4.FACTOR, "nvfp4, divided": nvfp4.DIVISOR}
    return Nvfp4Codec(seconds[format]) if format in seconds else codec_for(format)
