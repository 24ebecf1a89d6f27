"""What quantizing codecs have in common: matrices are quantized one by one, biases are not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from moe_local.offload.quantize.layout import Layout, TensorSpec, make_layout
from moe_local.offload.quantize.views import copy_exactly, segment_view, zero_padding

Part = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a segment."""


class MatrixCodec(ABC):
    """A Codec that quantizes each matrix separately and keeps biases in float32, in a segment "values"."""

    name: str
    exact = False

    @abstractmethod
    def matrix_parts(self, rows: int, cols: int) -> Sequence[Part]:
        """The segments of a matrix [rows, cols], in buffer order."""

    @abstractmethod
    def encode_matrix(self, name: str, weights: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Fill matrix `name`'s segments of `out`. Raises CheckpointError for weights that the format cannot
        represent."""

    @abstractmethod
    def decode_matrix(
        self, buffer: torch.Tensor, layout: Layout, tensor: TensorSpec, dtype: torch.dtype
    ) -> torch.Tensor:
        """The matrix, a new tensor in `dtype`."""

    def layout(self, tensors: Sequence[TensorSpec]) -> Layout:
        """As Codec.layout."""
        parts: list[tuple[str, str, str, tuple[int, ...]]] = []
        for tensor in tensors:
            if len(tensor.shape) < 2:
                parts.append((tensor.name, "values", "float32", tensor.shape))
            else:
                parts += [(tensor.name, *part) for part in self.matrix_parts(*tensor.shape)]
        return make_layout(self.name, tensors, parts)

    def encode(self, tensors: Mapping[str, torch.Tensor], layout: Layout, out: torch.Tensor) -> None:
        """As Codec.encode; raises CheckpointError for weights that the format cannot represent."""
        for tensor in layout.tensors:
            if len(tensor.shape) < 2:
                (segment,) = layout.parts(tensor.name)
                copy_exactly(tensor.name, tensors[tensor.name], segment_view(out, segment), "fp32")
            else:
                self.encode_matrix(tensor.name, tensors[tensor.name], layout, out)
        zero_padding(out, layout)

    def decode(self, buffer: torch.Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """New tensors in `dtype` (float32, bfloat16 or float16) on the buffer's device and current stream."""
        decoded = {}
        for tensor in layout.tensors:
            if len(tensor.shape) < 2:
                (segment,) = layout.parts(tensor.name)
                decoded[tensor.name] = segment_view(buffer, segment).to(dtype)
            else:
                decoded[tensor.name] = self.decode_matrix(buffer, layout, tensor, dtype)
        return decoded
