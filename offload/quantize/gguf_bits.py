"""Takes the bytes of GGUF's blocks apart. Blocks are little-endian, and so must the machine be."""

from __future__ import annotations

import torch


def half(raw: torch.Tensor) -> torch.Tensor:
    """float16 as bytes, uint8 [B, 2 n] -> float32 [B, n]."""
    return words(raw, torch.float16).float()


def words(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of `dtype` as bytes, uint8 [..., n times its size] -> new `dtype` [..., n]."""
    return raw.clone(memory_format=torch.contiguous_format).view(dtype)  # a view might not be aligned


def fields(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Integers [..., n] -> [..., n * count]: `count` fields of `width` bits of each, the lowest first."""
    shifts = torch.arange(0, width * count, width, dtype=packed.dtype, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)).flatten(-2)


def nibbles(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> [..., 2, n]: the lower halves of all bytes, then the upper ones."""
    return torch.stack([raw & 15, raw >> 4], dim=-2)


def pairs(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> [..., 4, n]: the lowest two bits of all bytes, then the next two, and so on."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)
    return (raw.unsqueeze(-2) >> shifts[:, None]) & 3
