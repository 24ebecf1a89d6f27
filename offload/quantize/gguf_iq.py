"""Decoders of GGUF's IQ1, IQ2 and IQ3 formats (ggml-common.h in github.com/ggml-org/ggml).

A code stands for a pattern of four or eight numbers of a grid (`gguf_grids`). The grids of IQ2 and IQ3 hold
magnitudes, and signs come apart. All products are exact in float32.

Patterns are looked up as one integer of 32 or 64 bits each, whose bytes are the numbers.
"""

from __future__ import annotations

from functools import cache

import torch

from moe_local.offload.quantize.gguf_bits import fields, half, words
from moe_local.offload.quantize.gguf_grids import patterns

DELTA = 8
"""IQ1's numbers are those of its grid, plus or minus an eighth."""


def iq1_s(raw: torch.Tensor) -> torch.Tensor:
    """Eight parts of 32 numbers, four codes each. A part's word of 16 bits has the upper three bits of its
    codes, its scale, and the sign of its eighths."""
    high = words(raw[:, 34:50], torch.int16)
    codes = raw[:, 2:34].int() | fields(high, 3, 4).int() << 8
    codes |= (high < 0).int().repeat_interleave(4, 1) << 11
    scale = (2 * fields(high >> 12, 3, 1) + 1) * (half(raw[:, :2]) / DELTA)
    return _scaled(_eighths(), codes, scale)


def iq1_m(raw: torch.Tensor) -> torch.Tensor:
    """Sixteen parts of 16 numbers, two codes each. Half a byte has a code's upper three bits and the sign of
    its eighths; each of four words of 16 bits has four scales and a quarter of the block's float16."""
    codes = raw[:, :32].int() | fields(raw[:, 32:48], 4, 2).int() << 8
    packed = words(raw[:, 48:56], torch.int16)
    quarters = raw[:, 49:56:2] >> 4
    whole = half(quarters[:, ::2] | quarters[:, 1::2] << 4)
    return _scaled(_eighths(), codes, (2 * fields(packed, 3, 4) + 1) * (whole / DELTA))


def iq2_xxs(raw: torch.Tensor) -> torch.Tensor:
    """Eight parts of 32 numbers: four codes, then 28 bits of signs and four of a scale."""
    parts = raw[:, 2:].unflatten(1, (8, 8))
    signs, scale = _signs_and_scale(parts[:, :, 4:], raw)
    return _signed("IQ2_XXS", parts[:, :, :4], signs, scale / 4)


def iq2_xs(raw: torch.Tensor) -> torch.Tensor:
    """Words of 16 bits: nine of a code, seven of signs. Sixteen parts of 16 numbers have a scale each."""
    packed = words(raw[:, 2:66], torch.int16).int()
    scale = (fields(raw[:, 66:], 4, 2) + 0.5) * (half(raw[:, :2]) / 4)
    return _signed("IQ2_XS", packed & 511, _even((packed >> 9) & 127), scale)


def iq2_s(raw: torch.Tensor) -> torch.Tensor:
    """Codes without their upper two bits, signs, those bits, and scales of sixteen parts of 16 numbers."""
    codes = raw[:, 2:34].int() | fields(raw[:, 66:74], 2, 4).int() << 8
    scale = (fields(raw[:, 74:], 4, 2) + 0.5) * (half(raw[:, :2]) / 4)
    return _signed("IQ2_S", codes, raw[:, 34:66], scale)


def iq3_xxs(raw: torch.Tensor) -> torch.Tensor:
    """64 codes, then signs and scales of eight parts of 32 numbers, as in IQ2_XXS."""
    signs, scale = _signs_and_scale(raw[:, 66:].unflatten(1, (8, 4)), raw)
    return _signed("IQ3_XXS", raw[:, 2:66], signs, scale / 2)


def iq3_s(raw: torch.Tensor) -> torch.Tensor:
    """Codes without their uppermost bit, those bits, signs, and scales of eight parts of 32 numbers."""
    codes = raw[:, 2:66].int() | fields(raw[:, 66:74], 1, 8).int() << 8
    scale = (2 * fields(raw[:, 106:], 4, 2) + 1) * half(raw[:, :2])
    return _signed("IQ3_S", codes, raw[:, 74:106], scale)


def _signs_and_scale(raw: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [B, 8, 4] -> the signs of 32 numbers each, integers [B, 8, 4], and scales, float32 [B, 8]."""
    packed = words(raw, torch.int32).squeeze(2)
    scale = (fields(packed >> 28, 4, 1) + 0.5) * half(blocks[:, :2])
    return _even(fields(packed, 7, 4)), scale


def _even(signs: torch.Tensor) -> torch.Tensor:
    """Seven signs, as bits of integers -> eight, of which an even number are minus."""
    parity = signs ^ signs >> 4
    parity = parity ^ parity >> 2
    return signs | ((parity ^ parity >> 1) & 1) << 7


def _signed(format: str, codes: torch.Tensor, signs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Integers with B * 256 / (4 or 8) codes and B * 32 bytes of signs, float32 [B, parts] -> [B, 256]."""
    return _scaled(_magnitudes(format), codes, scale, signs)


def _scaled(
    table: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor | None = None
) -> torch.Tensor:
    numbers = table.index_select(0, codes.flatten().int()).view(torch.int8)
    if signs is not None:
        numbers.mul_(_signs().index_select(0, signs.flatten().int()).view(torch.int8))
    return (numbers.view(*scale.shape, -1) * scale.unsqueeze(-1)).flatten(1)


@cache
def _eighths() -> torch.Tensor:
    """IQ1's numbers times eight, int64 [4096]: with an eighth added, then with one subtracted."""
    grid = patterns("IQ1_S") * DELTA
    return torch.cat([grid + 1, grid - 1]).view(torch.int64).flatten()


@cache
def _magnitudes(format: str) -> torch.Tensor:
    grid = patterns(format)
    return grid.view(torch.int64 if grid.shape[1] == 8 else torch.int32).flatten()


@cache
def _signs() -> torch.Tensor:
    """Eight numbers 1 or -1 for each byte, whose bits say which are minus, the lowest first; int64 [256]."""
    bits = fields(torch.arange(256, dtype=torch.uint8, device="cpu")[:, None], 1, 8)
    return (1 - 2 * bits.to(torch.int8)).view(torch.int64).flatten()
