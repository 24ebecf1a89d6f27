"""Decoders of the block formats of GGUF files (ggml-common.h in github.com/ggml-org/ggml).

A block holds 32 or 256 numbers of a row. All scales are float16, in some formats times small integers, except
MXFP4's, which are powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_local.offload.quantize import mxfp4
from moe_local.offload.quantize.fp8 import exponents

SUPER = 256
"""Numbers in a block of the K formats, and of IQ4_XS."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The numbers that the codes of IQ4_NL and IQ4_XS stand for."""


class BlockFormat(NamedTuple):
    """Blocks of `numbers` numbers in `nbytes` bytes; `decode` converts uint8 [B, nbytes] to float32 [B,
    numbers]."""

    numbers: int
    nbytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]


def dequantize_gguf(raw: torch.Tensor, format: str) -> torch.Tensor:
    """Rows of blocks, uint8 [..., bytes of a row] -> new float32 [..., numbers of a row]."""
    numbers, nbytes, decode = FORMATS[format]
    blocks = decode(raw.reshape(-1, nbytes))
    return blocks.view(*raw.shape[:-1], raw.shape[-1] // nbytes * numbers)


def _half(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 2 n] -> float32 [B, n]."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> [..., 2, n]: the lower halves of all bytes, then the upper ones."""
    return torch.stack([raw & 15, raw >> 4], dim=-2)


def _bits(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [B, n] -> [B, 8 n]: the bits of each byte, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return ((raw[:, :, None] >> shifts) & 1).flatten(1)


def _pairs(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> [..., 4, n]: the lowest two bits of all bytes, then the next two, and so on."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)
    return (raw.unsqueeze(-2) >> shifts[:, None]) & 3


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    return _nibbles(raw[:, 2:]).flatten(1).float().sub_(8).mul_(_half(raw[:, :2]))


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    return _nibbles(raw[:, 4:]).flatten(1).float().mul_(_half(raw[:, :2])).add_(_half(raw[:, 2:4]))


def _q5_0(raw: torch.Tensor) -> torch.Tensor:
    q = _nibbles(raw[:, 6:]).flatten(1) | _bits(raw[:, 2:6]) << 4
    return q.float().sub_(16).mul_(_half(raw[:, :2]))


def _q5_1(raw: torch.Tensor) -> torch.Tensor:
    q = _nibbles(raw[:, 8:]).flatten(1) | _bits(raw[:, 4:8]) << 4
    return q.float().mul_(_half(raw[:, :2])).add_(_half(raw[:, 2:4]))


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float().mul_(_half(raw[:, :2]))


def _q2_k(raw: torch.Tensor) -> torch.Tensor:
    """Sixteen parts of 16 numbers, each with a byte: scale in its lower half, minimum in its upper."""
    factors = raw[:, :16]
    scale = (_half(raw[:, 80:82]) * (factors & 15)).unsqueeze(-1)
    least = (_half(raw[:, 82:84]) * (factors >> 4)).unsqueeze(-1)
    q = _pairs(raw[:, 16:80].unflatten(1, (2, 32))).reshape(-1, 16, 16)
    return (q.float() * scale - least).flatten(1)


def _q3_k(raw: torch.Tensor) -> torch.Tensor:
    """Sixteen parts of 16 numbers with scales of six bits, less 32. Bit n of byte i is the third bit of
    number 32 n + i, inverted."""
    low, high = _nibbles(raw[:, 96:104]).flatten(1), _pairs(raw[:, 104:108]).flatten(1)
    scale = ((low | high << 4).float() - 32) * _half(raw[:, 108:110])
    third = _bits(raw[:, :32]).unflatten(1, (32, 8)).transpose(1, 2).reshape(-1, 16, 16)
    q: torch.Tensor = _pairs(raw[:, 32:96].unflatten(1, (2, 32))).reshape(-1, 16, 16) | third << 2
    return ((q.float() - 4) * scale.unsqueeze(-1)).flatten(1)


def _q4_k(raw: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_minima(raw)
    q = _nibbles(raw[:, 16:].unflatten(1, (4, 32))).flatten(1, 2)
    return (q.float() * scale - least).flatten(1)


def _q5_k(raw: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_minima(raw)
    fifth = _bits(raw[:, 16:48]).unflatten(1, (32, 8)).transpose(1, 2)
    q: torch.Tensor = _nibbles(raw[:, 48:].unflatten(1, (4, 32))).flatten(1, 2) | fifth << 4
    return (q.float() * scale - least).flatten(1)


def _q6_k(raw: torch.Tensor) -> torch.Tensor:
    low = _nibbles(raw[:, :128].unflatten(1, (2, 64))).view(-1, 8, 32)
    high = _pairs(raw[:, 128:192].unflatten(1, (2, 32))).view(-1, 8, 32)
    scale = raw[:, 192:208].contiguous().view(torch.int8).float() * _half(raw[:, 208:])
    q = (low | high << 4).float().sub_(32).view(-1, 16, 16)
    decoded: torch.Tensor = (q * scale[..., None]).flatten(1)
    return decoded


def _scales_and_minima(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and minima of a block's eight parts, float32 [B, 8, 1] each.

    They are two float16 numbers times 6-bit integers, packed into twelve bytes, four each of a, b and c. a
    has the first four scales and, above them, the upper two bits of the last four; b has the same of the
    minima; c has the lower four bits of the last scales and minima.
    """
    a, b, c = raw[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scale = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], dim=1)
    least = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], dim=1)
    return (_half(raw[:, :2]) * scale).unsqueeze(-1), (_half(raw[:, 2:4]) * least).unsqueeze(-1)


def _iq4_nl(raw: torch.Tensor) -> torch.Tensor:
    return _iq4(_nibbles(raw[:, 2:]).flatten(1)).mul_(_half(raw[:, :2]))


def _iq4_xs(raw: torch.Tensor) -> torch.Tensor:
    """Eight parts of 32 numbers; the scales' upper two bits are apart, four to a byte."""
    halves = raw[:, 4:8].unsqueeze(-1)
    low = torch.cat([halves & 15, halves >> 4], dim=-1).flatten(1)
    high = _pairs(raw[:, 2:4]).transpose(1, 2).flatten(1)
    scale = ((low | high << 4).float() - 32) * _half(raw[:, :2])
    q = _iq4(_nibbles(raw[:, 8:].unflatten(1, (8, 16))).flatten(2))
    decoded: torch.Tensor = q.mul_(scale.unsqueeze(-1)).flatten(1)
    return decoded


def _iq4(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(IQ4, dtype=torch.float32, device=codes.device)[codes.int()]


def _mxfp4(raw: torch.Tensor) -> torch.Tensor:
    """gpt-oss' numbers, with those of a block's first half in the lower halves of its bytes."""
    codes = _nibbles(raw[:, 1:]).flatten(1).int()
    return mxfp4.numbers(raw.device)[codes].mul_(exponents(raw[:, :1]))


FORMATS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q2_K": BlockFormat(SUPER, 84, _q2_k),
    "Q3_K": BlockFormat(SUPER, 110, _q3_k),
    "Q4_K": BlockFormat(SUPER, 144, _q4_k),
    "Q5_K": BlockFormat(SUPER, 176, _q5_k),
    "Q6_K": BlockFormat(SUPER, 210, _q6_k),
    "IQ4_NL": BlockFormat(32, 18, _iq4_nl),
    "IQ4_XS": BlockFormat(SUPER, 136, _iq4_xs),
    "MXFP4": BlockFormat(32, 17, _mxfp4),
}
