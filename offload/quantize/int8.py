"""Int8: integers with one fp16 scale per 64 columns of a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.matrix_codec import MatrixCodec, Part
from moe_local.offload.quantize.parallel import for_rows
from moe_local.offload.quantize.views import check_finite, views_of

BLOCK = 64
"""Columns of a row that share one scale; the last ones of a row may be fewer."""

LIMIT = 127
"""The largest integer. -128 is never written, so that absolute values fit int8 in kernels."""


class Int8Matrix(NamedTuple):
    """The parts of one matrix [M, N], views of an expert's buffer.

    Weight [m, n] is q[m, n] * scale[m, n // 64].
    """

    q: torch.Tensor
    """int8 [M, N], -127 to 127."""
    scale: torch.Tensor
    """float16 [M, ceil(N / 64)], never negative; zero if all weights of the block are."""


def int8_matrix(buffer: torch.Tensor, layout: Layout, name: str) -> Int8Matrix:
    """Matrix `name` of the expert in `buffer` (uint8, any device), without copying."""
    return Int8Matrix(**views_of(buffer, layout, name))


class Int8Codec(MatrixCodec):
    """8.25 bits per weight. Matrices are quantized symmetrically, rounded to nearest; biases stay float32."""

    name = "int8"

    def matrix_parts(self, rows: int, cols: int) -> Sequence[Part]:
        return [("q", "int8", (rows, cols)), ("scale", "float16", (rows, -(-cols // BLOCK)))]

    def encode_matrix(self, name: str, weights: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Computed on the weights' device; the bits are the same on all. Raises CheckpointError for NaN,
        infinity, and weights beyond 127 times the largest fp16 number."""
        _quantize(name, weights, int8_matrix(out, layout, name))

    def decode_matrix(
        self, buffer: torch.Tensor, layout: Layout, tensor: TensorSpec, dtype: torch.dtype
    ) -> torch.Tensor:
        return dequantize(int8_matrix(buffer, layout, tensor.name), dtype)


def dequantize(matrix: Int8Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in `dtype`, [M, N]: products are exact in fp32 and rounded once, to `dtype`."""
    values = torch.empty(matrix.q.shape, dtype=dtype, device=matrix.q.device)

    def work(rows: slice) -> None:
        scales = matrix.scale[rows].float()
        for columns, blocks in _columns(matrix.q.shape[1]):
            q, out = (_in_blocks(whole[rows, columns]) for whole in (matrix.q, values))
            torch.mul(q, scales[:, blocks].unsqueeze(2), out=out)

    for_rows(matrix.q, work)
    return values


def _quantize(name: str, weights: torch.Tensor, out: Int8Matrix) -> None:
    """Fill `out`, which is on the CPU. Raises CheckpointError for weights that int8 cannot represent."""
    weights = weights.detach()

    def work(rows: slice) -> None:
        for columns, blocks in _columns(weights.shape[1]):
            values = _in_blocks(weights[rows, columns].float())
            scales, inverse = _scales(torch.linalg.vector_norm(values, torch.inf, 2))
            _in_blocks(out.q[rows, columns]).copy_(torch.mul(values, inverse.unsqueeze(2)).round_())
            out.scale[rows, blocks].copy_(scales)

    for_rows(weights, work)
    if bool(torch.isfinite(out.scale).all()):
        return
    check_finite(name, weights)
    largest = LIMIT * torch.finfo(torch.float16).max
    raise CheckpointError(
        f"{name} has weights up to {float(weights.abs().max()):.4g}, above the largest int8 takes, "
        f"{largest:.4g}; use bf16 or fp32"
    )


def _scales(largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitude of each block, float32 -> its scale, float16, and the factor for its weights.

    The scale is magnitude / 127, rounded to nearest, which has the least error. If the magnitude times the
    factor would then round to 128, as it can where fp16 is subnormal, the scale is the next larger number.
    NaN and infinity give scales that are not finite.
    """
    scales = (largest / LIMIT).half()
    too_small = largest * (1 / scales.float()) >= LIMIT + 0.5
    scales = (scales.view(torch.int16) + too_small).to(torch.int16).view(torch.float16)  # the next number up
    return scales, torch.where(scales > 0, 1 / scales.float(), 0.0)


def _columns(count: int) -> Iterator[tuple[slice, slice]]:
    """The columns of a row that form whole blocks, with their blocks; then the remaining columns, in one
    block."""
    blocks, rest = divmod(count, BLOCK)
    if blocks:
        yield slice(0, count - rest), slice(0, blocks)
    if rest:
        yield slice(count - rest, count), slice(blocks, blocks + 1)


def _in_blocks(columns: torch.Tensor) -> torch.Tensor:
    """[M, C] of one of `_columns` -> [M, blocks, columns of a block], a view."""
    return columns.view(columns.shape[0], -1, min(BLOCK, columns.shape[1]))
