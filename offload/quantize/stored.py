"""Experts in their publisher's format, read in place: FP8, MXFP4, NVFP4, or plain, of any dtype and order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize import fp8, mxfp4, nvfp4
from moe_local.offload.quantize.exact import STORAGE, ExactCodec
from moe_local.offload.quantize.layout import Layout, TensorSpec, make_layout
from moe_local.offload.quantize.views import views_of

QUANTIZED = ("fp8", "mxfp4", "nvfp4")
FORMATS = (*QUANTIZED, "plain")
"""The formats that StoredDecoder reads; "plain" is unquantized weights in another layout than
ExactCodec's."""


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """The format of a checkpoint's experts, from its config."""

    name: str
    """"bf16", "fp16", "fp32", "fp8", "mxfp4", "nvfp4", or a quantization method that nothing reads in
    place."""
    dtype: str
    """The dtype of what is not quantized: "bfloat16", "float16" or "float32"."""
    block: tuple[int, int] | None = None
    """For FP8: rows and columns that share a scale; None: one scale per stored tensor."""

    def layout(self, tensors: Sequence[TensorSpec]) -> Layout:
        """A layout of an expert with these tensors, for plans. It is at least as large as the actual one,
        which depends on how the stored tensors are divided, and as large for all published checkpoints.
        Raises CheckpointError for formats that cannot be read in place."""
        if self.name not in (*STORAGE, *QUANTIZED):
            raise CheckpointError(
                f"experts that {self.name} has packed cannot be read in place; "
                'use another format than experts="native"'
            )
        if self.name in STORAGE:
            return ExactCodec(self.name).layout(tensors)
        parts = []
        for tensor in tensors:
            if len(tensor.shape) < 2:
                parts.append((tensor.name, "values", self.dtype, tensor.shape))
                continue
            rows, columns = tensor.shape
            if self.name == "mxfp4":
                parts.append((tensor.name, "q", "uint8", (rows, columns // 2)))
                parts.append((tensor.name, "scale", "uint8", (rows, -(-columns // mxfp4.BLOCK))))
            elif self.name == "nvfp4":
                parts.append((tensor.name, "q", "uint8", (rows, columns // 2)))
                parts.append((tensor.name, nvfp4.FACTOR, "float32", (2,)))
                parts.append((tensor.name, "scale", "float8_e4m3fn", (rows, columns // nvfp4.BLOCK)))
            else:
                parts.append((tensor.name, "q", "float8_e4m3fn", (rows, columns)))
                parts.append((tensor.name, "scale", "float32", self._grid(rows, columns)))
        return make_layout(self.name, tensors, parts)

    def _grid(self, rows: int, columns: int) -> tuple[int, int]:
        """The grid of scales of a matrix whose upper and lower halves are stored separately, as gate and up
        often are."""
        if self.block is None:
            return 2, 1
        return 2 * -(-rows // (2 * self.block[0])), -(-columns // self.block[1])


class StoredDecoder:
    """Decodes experts whose buffer has the bytes of the checkpoint. Stateless.

    A tensor's parts are either "values", numbers in the tensor's shape; or "transposed", numbers as [in,
    out]; or "q" and "scale", which are FP8, or, if "q" is uint8, MXFP4, or NVFP4 if there is one of
    `nvfp4.SECONDS`, too. See `fp8`, `mxfp4` and `nvfp4`.
    """

    def decode(self, buffer: torch.Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """As Codec.decode; unquantized tensors of `dtype` are returned as views of `buffer`."""
        return {
            tensor.name: _decode(tensor, views_of(buffer, layout, tensor.name), dtype)
            for tensor in layout.tensors
        }


def _decode(tensor: TensorSpec, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    if "values" in parts:
        return parts["values"].to(dtype)
    if "transposed" in parts:
        return parts["transposed"].T.to(dtype)
    q, scale = parts["q"], parts["scale"]
    for name in nvfp4.SECONDS:
        if name in parts:
            return nvfp4.dequantize_nvfp4(q, scale, parts[name], divides=name == nvfp4.DIVISOR).to(dtype)
    if q.dtype == torch.uint8:
        return mxfp4.dequantize_mxfp4(q, scale, dtype, tensor.shape[1])
    return fp8.dequantize_fp8(q, scale, dtype)
