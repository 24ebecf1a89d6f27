"""NF4: 4-bit NormalFloat in blocks of 64 with double-quantized scales, byte for byte as bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.code_tables import dynamic_map
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.matrix_codec import MatrixCodec, Part
from moe_local.offload.quantize.nf4_blocks import BLOCK as BLOCK
from moe_local.offload.quantize.nf4_blocks import quantize_blocks
from moe_local.offload.quantize.nf4_scales import NESTED_BLOCK as NESTED_BLOCK
from moe_local.offload.quantize.nf4_scales import quantize_scales
from moe_local.offload.quantize.views import check_finite, views_of


class NF4Matrix(NamedTuple):
    """The parts of one matrix [M, N], as views of an expert's buffer.

    Weight i (row major) is level[q nibble i] * scale[i // 64], where
    scale[b] = dynamic_map[absmax[b]] * absmax_scale[b // 256] + offset.
    """

    shape: tuple[int, ...]
    q: torch.Tensor
    """uint8 [ceil(M * N / 2)]; byte j holds weight 2j in its high and weight 2j + 1 in its low half."""
    absmax: torch.Tensor
    """uint8 [ceil(M * N / 64)], indices into the dynamic map."""
    absmax_scale: torch.Tensor
    """float32 [ceil(len(absmax) / 256)]."""
    offset: torch.Tensor
    """float32 []."""


def nf4_matrix(buffer: torch.Tensor, layout: Layout, name: str) -> NF4Matrix:
    """Matrix `name` of the expert in `buffer` (uint8, any device), without copying."""
    shape = next(tensor.shape for tensor in layout.tensors if tensor.name == name)
    return NF4Matrix(shape, **views_of(buffer, layout, name))


class NF4Codec(MatrixCodec):
    """4.127 bits per weight. Each matrix is quantized as a whole; biases stay float32.

    Source: QLoRA (arXiv 2305.14314) as in bitsandbytes.functional.quantize_4bit(quant_type="nf4",
    blocksize=64, compress_statistics=True), with whose results the parts are bit-equal.
    """

    name = "nf4"

    def matrix_parts(self, rows: int, cols: int) -> Sequence[Part]:
        blocks = -(-rows * cols // BLOCK)
        return [
            ("q", "uint8", (-(-rows * cols // 2),)),
            ("absmax", "uint8", (blocks,)),
            ("absmax_scale", "float32", (-(-blocks // NESTED_BLOCK),)),
            ("offset", "float32", ()),
        ]

    def encode_matrix(self, name: str, weights: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Computed on the weights' device, except that scales are quantized on the CPU; the bits are the same
        on all devices. Raises CheckpointError for NaN and infinity."""
        _quantize(name, weights, nf4_matrix(out, layout, name))

    def decode_matrix(
        self, buffer: torch.Tensor, layout: Layout, tensor: TensorSpec, dtype: torch.dtype
    ) -> torch.Tensor:
        return dequantize(nf4_matrix(buffer, layout, tensor.name), dtype)


def dequantize(matrix: NF4Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in `dtype`, [M, N], computed on its device and current stream; `matrix` is read in place."""
    scales = block_scales(matrix)
    rows = matrix.shape
    if rows[-1] % BLOCK:
        # bitsandbytes 0.50.2 misplaces scales on AVX512 CPUs when rows are not whole blocks. As a single row
        # (of even length, which keeps the number of blocks) the same numbers are decoded correctly.
        rows = (1, 2 * matrix.q.numel())
    values: torch.Tensor = bitsandbytes_ops().dequantize_4bit.default(
        matrix.q, scales, BLOCK, "nf4", rows, dtype
    )
    return values.view(-1)[: TensorSpec("", matrix.shape).numel].view(matrix.shape)


def block_scales(matrix: NF4Matrix) -> torch.Tensor:
    """The scale of each block of 64 weights, float32 [blocks], on the matrix' device."""
    code = dynamic_map(matrix.absmax.device)
    scales: torch.Tensor = bitsandbytes_ops().dequantize_blockwise.default(
        matrix.absmax, matrix.absmax_scale, code, NESTED_BLOCK, torch.float32
    )
    return scales.add_(matrix.offset)


def _quantize(name: str, weights: torch.Tensor, out: NF4Matrix) -> None:
    """Fill `out`, which is on the CPU. Raises CheckpointError for NaN and infinity."""
    absmax = torch.empty(out.absmax.numel(), dtype=torch.float32, device=weights.device)
    if weights.device.type == "cpu":
        quantize_blocks(weights, out.q, absmax)
    else:
        q = torch.empty_like(out.q, device=weights.device)
        quantize_blocks(weights, q, absmax)
        out.q.copy_(q)
        absmax = absmax.cpu()
    offset = absmax.mean()
    if not bool(torch.isfinite(offset)):
        check_finite(name, weights)
        raise CheckpointError(f"{name} has weights up to {float(absmax.max()):.4g}, too large for NF4")
    out.offset.copy_(offset)
    quantize_scales(absmax, offset, out.absmax, out.absmax_scale)
