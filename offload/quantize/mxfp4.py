"""MXFP4: 4-bit floats (E2M1), one power of two per block of 32 (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize.fp8 import exponents
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.matrix_codec import MatrixCodec, Part
from moe_local.offload.quantize.parallel import for_rows
from moe_local.offload.quantize.views import check_finite, views_of

BLOCK = 32
"""Columns of a row that share a scale; the last ones of a row may be fewer."""

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that the lower three bits of a code stand for; the fourth bit is the sign."""

BIAS = 127
"""A scale's byte is its exponent plus this."""


class MXFP4Matrix(NamedTuple):
    """The parts of one matrix [M, N], views of an expert's buffer."""

    q: torch.Tensor
    """uint8 [M, ceil(N / 2)]; byte j of a row has weight 2j in its low and weight 2j + 1 in its high half."""
    scale: torch.Tensor
    """uint8 [M, ceil(N / 32)], biased exponents (E8M0)."""


def mxfp4_matrix(buffer: torch.Tensor, layout: Layout, name: str) -> MXFP4Matrix:
    """Matrix `name` of the expert in `buffer` (uint8, any device), without copying."""
    return MXFP4Matrix(**views_of(buffer, layout, name))


class MXFP4Codec(MatrixCodec):
    """4.25 bits per weight, in the layout of the published gpt-oss. Biases stay float32.

    By the specification (section 6.3) a block's largest weight decides its exponent: scaled, it is in 4 to 8,
    and what is above 6 is clipped to 6. If the next larger exponent, which clips nothing, has a smaller
    squared error, it is taken instead. Weights are rounded to nearest, ties to the even mantissa. No weight
    is off by more than a quarter of its block's largest (if that is at least 2^-125).
    """

    name = "mxfp4"

    def matrix_parts(self, rows: int, cols: int) -> Sequence[Part]:
        return [("q", "uint8", (rows, -(-cols // 2))), ("scale", "uint8", (rows, -(-cols // BLOCK)))]

    def encode_matrix(self, name: str, weights: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Raises CheckpointError for NaN, infinity, and weights of 3.5 * 2^126 and more."""
        _quantize(name, weights, mxfp4_matrix(out, layout, name))

    def decode_matrix(
        self, buffer: torch.Tensor, layout: Layout, tensor: TensorSpec, dtype: torch.dtype
    ) -> torch.Tensor:
        return dequantize_mxfp4(*mxfp4_matrix(buffer, layout, tensor.name), dtype, tensor.shape[1])


def dequantize_mxfp4(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, columns: int | None = None
) -> torch.Tensor:
    """q uint8 [..., ceil(N / 2)], scale uint8 [..., ceil(N / 32)] -> new [..., N] in `dtype`.

    `columns`: N, if it is not twice the number of bytes in a row of q. See MXFP4Matrix.
    """
    pairs = pairs_of_bytes(q.device).index_select(0, q.flatten().int()).view(*q.shape[:-1], -1)
    columns = pairs.shape[-1] if columns is None else columns
    if columns % BLOCK == 0:
        blocks = pairs.view(*scale.shape, BLOCK).mul_(exponents(scale).unsqueeze(-1))
        return blocks.view(*q.shape[:-1], columns).to(dtype)
    factors = exponents(scale).repeat_interleave(BLOCK, -1)[..., :columns]
    return pairs[..., :columns].mul(factors).to(dtype)


@cache
def numbers(device: torch.device) -> torch.Tensor:
    """The numbers that codes stand for, float32 [16]. Made once per device and never freed, since CUDA graphs
    read them."""
    with torch.inference_mode(False):
        return torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=device)


@lru_cache(maxsize=4)
def pairs_of_bytes(device: torch.device) -> torch.Tensor:
    """The two numbers in each possible byte, float32 [256, 2]."""
    values, byte = numbers(device), torch.arange(256, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)


def _quantize(name: str, weights: torch.Tensor, out: MXFP4Matrix) -> None:
    """Fill `out`, which is on the CPU. Raises CheckpointError for weights that MXFP4 cannot represent."""
    weights = weights.detach()
    columns = weights.shape[1]

    def work(rows: slice) -> None:
        values = weights[rows].float()
        if columns % BLOCK:
            values = torch.nn.functional.pad(values, (0, -columns % BLOCK))
        codes, scales = quantize_blocks(values.view(len(values), -1, BLOCK))
        packed = codes[..., ::2] | codes[..., 1::2] << 4
        out.q[rows].copy_(packed.view(len(values), -1)[:, : out.q.shape[1]])
        out.scale[rows].copy_(scales)

    for_rows(weights, work)
    if bool((out.scale < 255).all()):
        return
    check_finite(name, weights)
    raise CheckpointError(
        f"{name} has weights up to {float(weights.abs().max()):.4g}, above the largest mxfp4 takes, "
        f"{3.5 * 2**126:.4g}; use bf16 or fp32"
    )


def quantize_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., 32] -> codes, uint8 [..., 32], and scales, uint8 [...], 255 if no scale fits."""
    sizes = blocks.abs()
    bits = sizes.amax(-1).view(torch.int32)
    # The largest weight's exponent minus 2, biased. Blocks of smaller numbers get the smallest scale that
    # exists.
    first = ((bits >> 23) - 2).clamp_(min=0)
    sizes.mul_(exponents(2 * BIAS - first).unsqueeze(-1))
    near, halves = _rounded(sizes), sizes / 2
    far = _rounded(halves)
    errors, far_errors = (a.sub_(b).square_().sum(-1) for a, b in ((sizes, near), (halves, far)))
    better = 4 * far_errors < errors  # errors are in units of the scales; the far one is twice the near one
    chosen = torch.where(better.unsqueeze(-1), far, near)
    codes = torch.where(chosen < 1, (2 * chosen).int(), (chosen.view(torch.int32) >> 22) - CODE_OF_ONE)
    codes |= (blocks.view(torch.int32) >> 31) & 8
    return codes.to(torch.uint8), (first + better).masked_fill_(bits >= LIMIT_BITS, 255).to(torch.uint8)


LIMIT_BITS = (BIAS + 127) << 23 | 3 << 21
"""The bits of 3.5 * 2^126, the smallest magnitude that might round to more than float32 can represent."""

CODE_OF_ONE = (BIAS << 1) - 2
"""The difference between the upper bits of a float32 >= 1 (its exponent and first mantissa bit) and its E2M1
code."""


def _rounded(sizes: torch.Tensor) -> torch.Tensor:
    """The nearest of MAGNITUDES, ties to the even code. MAGNITUDES are floats with one bit of mantissa and,
    below 1, multiples of 1/2."""
    bits = sizes.view(torch.int32)
    cut = ((bits >> 22) & 1).add_(bits).add_((1 << 21) - 1).bitwise_and_(-1 << 22)
    return torch.where(sizes < 1, sizes.mul(2).round_().mul_(0.5), cut.view(torch.float32)).clamp_(max=6)
