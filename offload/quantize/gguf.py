"""Decoders of the block formats of GGUF files (ggml-common.h in github.com/ggml-org/ggml).

A block holds 32 or 256 numbers of a row. All scales are float16, in some formats times small integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

SUPER = 256
"""Numbers in a block of the K formats."""


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


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    return _nibbles(raw[:, 2:]).flatten(1).float().sub_(8).mul_(_half(raw[:, :2]))


def _q5_0(raw: torch.Tensor) -> torch.Tensor:
    bits = torch.arange(8, dtype=torch.uint8, device=raw.device)
    fifth = ((raw[:, 2:6, None] >> bits) & 1).flatten(1)
    return (_nibbles(raw[:, 6:]).flatten(1) | fifth << 4).float().sub_(16).mul_(_half(raw[:, :2]))


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float().mul_(_half(raw[:, :2]))


def _q4_k(raw: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_minima(raw)
    q = _nibbles(raw[:, 16:].unflatten(1, (4, 32))).flatten(1, 2)
    return (q.float() * scale - least).flatten(1)


def _q5_k(raw: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_minima(raw)
    bits = torch.arange(8, dtype=torch.uint8, device=raw.device)
    fifth = (raw[:, None, 16:48] >> bits[:, None]) & 1
    q = _nibbles(raw[:, 48:].unflatten(1, (4, 32))).flatten(1, 2) | fifth << 4
    return (q.float() * scale - least).flatten(1)


def _q6_k(raw: torch.Tensor) -> torch.Tensor:
    low = _nibbles(raw[:, :128].unflatten(1, (2, 64))).view(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)
    high = ((raw[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts[:, None]) & 3).view(-1, 8, 32)
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


FORMATS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q4_K": BlockFormat(SUPER, 144, _q4_k),
    "Q5_K": BlockFormat(SUPER, 176, _q5_k),
    "Q6_K": BlockFormat(SUPER, 210, _q6_k),
}
