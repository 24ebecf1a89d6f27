"""Experts without quantization: fp32, bf16 or fp16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moe_local.cache.errors import OptionError
from moe_local.offload.quantize.layout import Layout, TensorSpec, make_layout
from moe_local.offload.quantize.views import TORCH_DTYPES, copy_exactly, segment_view, zero_padding

STORAGE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class ExactCodec:
    """Keeps each tensor in one dtype as part "values"; no state besides its name."""

    exact = True

    def __init__(self, name: str) -> None:
        if name not in STORAGE:
            raise OptionError(f"unknown exact expert format {name!r}; use one of {', '.join(STORAGE)}")
        self.name = name

    def layout(self, tensors: Sequence[TensorSpec]) -> Layout:
        """One segment "values" per tensor, in the tensors' order."""
        parts = [(tensor.name, "values", STORAGE[self.name], tensor.shape) for tensor in tensors]
        return make_layout(self.name, tensors, parts)

    def encode(self, tensors: Mapping[str, torch.Tensor], layout: Layout, out: torch.Tensor) -> None:
        """Write the expert into `out`, uint8 [layout.nbytes] on the CPU, rounding to the storage dtype.

        Raises CheckpointError for NaN, infinity, and values too large for the storage dtype.
        """
        for segment in layout.segments:
            copy_exactly(segment.name, tensors[segment.name], segment_view(out, segment), self.name)
        zero_padding(out, layout)

    def decode(self, buffer: torch.Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The expert's tensors in `dtype`: views of `buffer` if it is stored in `dtype`, else new tensors."""
        return {segment.name: segment_view(buffer, segment).to(dtype) for segment in layout.segments}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the buffer holds."""
        return TORCH_DTYPES[STORAGE[self.name]]
