"""FP8 (E4M3) with one scale per block, as DeepSeek-V3 is published in (arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.matrix_codec import MatrixCodec, Part
from moe_local.offload.quantize.parallel import for_rows
from moe_local.offload.quantize.views import check_finite, views_of

BLOCK = 128
"""Rows and columns of a block, unless the checkpoint says otherwise."""

LARGEST = 448.0
"""E4M3's largest number (OCP 8-bit Floating Point Specification, section 5)."""

SMALLEST_SCALE = 2.0**-126
"""The smallest scale that the encoder writes."""


def dequantize_fp8(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """q [..., M, N] float8, scale [..., ceil(M / rows), ceil(N / columns)] -> new [..., M, N] in `dtype`.

    Scales are floats of any dtype, or exponents of powers of two as bytes (E8M0). If the number of scales
    does not fit `block`, the matrix is divided into equal blocks (for example, one scale for all of it).
    Multiplies in fp32.
    """
    scale = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    rows, columns = (block_size(q.shape[i], scale.shape[i], block[i]) for i in (-2, -1))
    if q.shape[-2] % rows == 0 and q.shape[-1] % columns == 0:
        blocks = (*q.shape[:-2], q.shape[-2] // rows, rows, q.shape[-1] // columns, columns)
        return q.float().view(blocks).mul_(scale[..., :, None, :, None]).view(q.shape).to(dtype)
    scale = scale.repeat_interleave(rows, -2)[..., : q.shape[-2], :]
    return q.float().mul_(scale.repeat_interleave(columns, -1)[..., : q.shape[-1]]).to(dtype)


def block_size(size: int, count: int, block: int = BLOCK) -> int:
    """The length of blocks if `count` of them cover `size`: `block`, or else size / count. Raises ValueError
    if neither fits."""
    if count > 0 and -(-size // block) == count:
        return block
    if count > 0 and size % count == 0:
        return size // count
    raise ValueError(f"{count} scales for {size} numbers in blocks of {block}")


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """The powers of two that E8M0 bytes stand for, float32 (OCP Microscaling Formats, section 5.4.1).

    255, which stands for no number, becomes infinity.
    """
    bits = scale.int() << 23
    return bits.masked_fill_(scale == 0, 1 << 22).view(torch.float32)  # 2^-127 is subnormal


class FP8Codec(MatrixCodec):
    """8.002 bits per weight: E4M3 with a float32 scale per 128 x 128 weights, in the layout of DeepSeek-V3.

    The rounding error of E4M3 is relative to each weight, 1/16 of it at worst, over more than four orders of
    magnitude, so smaller blocks would cost bits and gain nothing. Biases stay float32.
    """

    name = "fp8"

    def matrix_parts(self, rows: int, cols: int) -> Sequence[Part]:
        return [
            ("q", "float8_e4m3fn", (rows, cols)),
            ("scale", "float32", (-(-rows // BLOCK), -(-cols // BLOCK))),
        ]

    def encode_matrix(self, name: str, weights: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Raises CheckpointError for NaN and infinity. q never contains NaN."""
        _quantize(name, weights, **views_of(out, layout, name))

    def decode_matrix(
        self, buffer: torch.Tensor, layout: Layout, tensor: TensorSpec, dtype: torch.dtype
    ) -> torch.Tensor:
        q, scale = views_of(buffer, layout, tensor.name).values()
        return dequantize_fp8(q, scale, dtype)


def _quantize(name: str, weights: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    """Fill q [M, N] and scale [ceil(M / 128), ceil(N / 128)], on the CPU. Raises CheckpointError."""
    weights = weights.detach()
    columns = weights.shape[1]

    def work(rows: slice) -> None:
        values = weights[rows].float()
        sizes = values.abs()
        if (-len(sizes)) % BLOCK or (-columns) % BLOCK:
            sizes = torch.nn.functional.pad(sizes, (0, (-columns) % BLOCK, 0, (-len(sizes)) % BLOCK))
        blocks = sizes.view(-1, BLOCK, sizes.shape[1] // BLOCK, BLOCK)
        # The scale is kept above the subnormal numbers, so that both it and its inverse are precise.
        found = (blocks.amax((1, 3)) / LARGEST).clamp_(min=SMALLEST_SCALE)
        inverse = (1 / found).repeat_interleave(BLOCK, 0)[: len(values)]
        target = q[rows] if values.device == q.device else torch.empty_like(values, dtype=q.dtype)
        for block in range(found.shape[1]):
            part = slice(BLOCK * block, BLOCK * block + BLOCK)
            # Rounding may bring the largest weight slightly above LARGEST.
            scaled = (values[:, part] * inverse[:, block : block + 1]).clamp_(-LARGEST, LARGEST)
            target[:, part].copy_(scaled)
        if values.device != q.device:
            q[rows].copy_(target)
        scale[rows.start // BLOCK : -(-rows.stop // BLOCK)].copy_(found)

    for_rows(weights, work, BLOCK)
    if not bool(torch.isfinite(scale).all()):
        check_finite(name, weights)
