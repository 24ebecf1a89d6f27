"""q3 and q2: three and two bits per weight, plus scales that are found by search.

Each block of a row has a step, one of sixteen fractions of its row's scale, and a zero, which moves the few
levels to where the block's weights are: in a block with an outlier, the outlier gets the last level and the
other weights are around zero. This gains more than spending the same bits on finer levels, most for
heavy-tailed weights; docs/formats.md has figures, docs/log.md what else was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.low_blocks import (
    LOW_CHUNK,
    LOW_DEVICE_CHUNK,
    STEPS,
    THIRD_BITS,
    LowFormat,
    LowParts,
    quantize_rows,
)
from moe_local.offload.quantize.matrix_codec import MatrixCodec, Part
from moe_local.offload.quantize.parallel import for_rows
from moe_local.offload.quantize.views import check_finite, views_of


def low_matrix(buffer: torch.Tensor, layout: Layout, name: str) -> LowParts:
    """Matrix `name` of the expert in `buffer` (uint8, any device), without copying."""
    return LowParts(**views_of(buffer, layout, name))


class LowCodec(MatrixCodec):
    """q3: 3.25 bits per weight, blocks of 32; q2: 2.5 bits, blocks of 16; and 32 bits per row.

    Each block of a matrix row gets the scale byte with the least squared error; biases stay float32.
    """

    def __init__(self, format: LowFormat) -> None:
        self.name = format.name
        self.format = format

    def matrix_parts(self, rows: int, cols: int) -> Sequence[Part]:
        blocks = self.format.blocks(cols)
        return [
            ("q", "uint8", (rows, self.format.planes, 4 * blocks)),
            ("scale", "uint8", (rows, blocks)),
            ("row_scale", "float32", (rows,)),
        ]

    def encode_matrix(self, name: str, weights: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Computed on the weights' device; the bits are the same on all. Raises CheckpointError for NaN,
        infinity, and rows whose range overflows float32."""
        matrix = low_matrix(out, layout, name)
        quantize_rows(weights, self.format, matrix)
        if not bool(torch.isfinite(matrix.row_scale).all()):
            check_finite(name, weights)
            raise CheckpointError(
                f"{name} has weights up to {float(weights.abs().max()):.4g}, too large for {self.name}; "
                "use bf16 or fp32"
            )

    def decode_matrix(
        self, buffer: torch.Tensor, layout: Layout, tensor: TensorSpec, dtype: torch.dtype
    ) -> torch.Tensor:
        return dequantize(low_matrix(buffer, layout, tensor.name), self.format, tensor.shape[1], dtype)


def dequantize(matrix: LowParts, format: LowFormat, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in `dtype`, [M, cols]. Step times (level - zero) is exact; its product with the row's scale
    is rounded."""
    rows, device = len(matrix.row_scale), matrix.q.device
    values = torch.empty(rows, cols, dtype=dtype, device=device)
    steps, zeros, levels, places = _tables(format, device)

    def work(part: slice) -> None:
        words = matrix.q[part].view(torch.int32)
        codes = (words[:, : format.block // 16].transpose(1, 2).unsqueeze(3) >> places[:16]) & 3
        codes = codes.flatten(2)
        if format.planes == 3:
            codes = codes | ((words[:, 2].unsqueeze(2) >> places[16:]) & 1) << 2
        scale = matrix.scale[part].int()
        level = levels[codes] - zeros[scale >> 4].unsqueeze(2)
        scaled = (level * steps[scale & 15].unsqueeze(2)).flatten(1)[:, :cols]
        values[part] = (scaled * matrix.row_scale[part, None]).to(dtype)

    for_rows(values, work, chunk=LOW_CHUNK, device_chunk=LOW_DEVICE_CHUNK)
    return values


@lru_cache(maxsize=8)
def _tables(format: LowFormat, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Steps [16], zeros [16] and levels, float32; and shifts of 16 codes, then 32 third bits, int32."""
    places = (*range(0, 32, 2), *THIRD_BITS)
    return (
        torch.tensor(STEPS, device=device),
        torch.tensor(format.zeros, device=device),
        torch.tensor(format.levels, dtype=torch.float32, device=device),
        torch.tensor(places, dtype=torch.int32, device=device),
    )
