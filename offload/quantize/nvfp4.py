"""NVFP4: 4-bit floats (E2M1), an E4M3 scale per block of 16, and one float32 scale for the whole tensor.

As NVIDIA Model Optimizer (`NVFP4QTensor`) and compressed-tensors (`NVFP4PackedCompressor`) write it. It is
only read: NF4 has the smaller error on fewer bits.
"""

from __future__ import annotations

import torch

from moe_local.offload.quantize.mxfp4 import pairs_of_bytes

BLOCK = 16
"""Columns of a row that share a scale."""

FACTOR, DIVISOR = SECONDS = ("factor", "divisor")
"""Names of the part of a layout that holds second scales: other scales are multiplied by them, or divided."""


def dequantize_nvfp4(
    q: torch.Tensor, scale: torch.Tensor, second: torch.Tensor, *, divides: bool
) -> torch.Tensor:
    """The weights, new float32 [M, N].

    q uint8 [M, N / 2], the earlier weight in the lower half of a byte; scale E4M3 [M, N / 16]; second float32
    [n], each for M / n consecutive rows, by which `scale` is multiplied or, if it `divides`, divided.
    """
    second = second.repeat_interleave(len(q) // len(second))[:, None]
    scale = scale.float().div_(second) if divides else scale.float().mul_(second)
    pairs = pairs_of_bytes(q.device).index_select(0, q.flatten().int())
    return pairs.view(*scale.shape, BLOCK).mul_(scale.unsqueeze(-1)).view(len(q), -1)
