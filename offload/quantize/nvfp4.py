"""NVFP4: 4-bit floats (E2M1), an E4M3 scale per block of 16, and one float32 scale for the whole tensor.

As NVIDIA Model Optimizer (`NVFP4QTensor`) and compressed-tensors (`NVFP4PackedCompressor`) write it.
"""

from __future__ import annotations

import torch

from moe_local.offload.quantize.mxfp4 import pairs_of_bytes

BLOCK = 16
"""Columns of a row that share a scale."""


def dequantize_nvfp4(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q uint8 [M, N / 2], the earlier weight in the lower half of a byte; scale [M, N / 16], of any dtype,
    with the tensor's scale multiplied in -> new float32 [M, N]."""
    pairs = pairs_of_bytes(q.device).index_select(0, q.flatten().int())
    return pairs.view(*scale.shape, BLOCK).mul_(scale.float().unsqueeze(-1)).view(len(q), -1)
