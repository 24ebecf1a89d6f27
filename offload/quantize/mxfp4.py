"""MXFP4: 4-bit floats (E2M1) in blocks of 32 with a power of two each (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from functools import lru_cache

import torch

from moe_local.offload.quantize.fp8 import exponents

BLOCK = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits; the fourth is the sign."""


def dequantize_mxfp4(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q uint8 [..., N / 2], scale uint8 [..., N / 32] -> new [..., N] in `dtype`.

    Byte j of a row holds number 2j in its low and 2j + 1 in its high half; scales are biased exponents.
    """
    numbers = _pairs(q.device).index_select(0, q.flatten().int())
    blocks = numbers.view(*scale.shape, BLOCK).mul_(exponents(scale).unsqueeze(-1))
    return blocks.view(*q.shape[:-1], 2 * q.shape[-1]).to(dtype)


@lru_cache(maxsize=4)
def _pairs(device: torch.device) -> torch.Tensor:
    """The two numbers of every byte, float32 [256, 2]."""
    values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).to(device)
