"""FP8 numbers with a scale for each block, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

import torch

BLOCK = 128
"""Rows and columns of a block where a checkpoint does not say otherwise."""


def dequantize_fp8(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """q [..., M, N] float8, scale [..., ceil(M / rows), ceil(N / columns)] -> new [..., M, N] in `dtype`.

    Scales are floats of any kind, or the exponents of powers of two as bytes (E8M0). A grid that is not one
    of `block`s divides the matrix into equal ones (one scale for all of it, for example). Multiplied in fp32.
    """
    scale = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    rows, columns = (block_size(q.shape[i], scale.shape[i], block[i]) for i in (-2, -1))
    if q.shape[-2] % rows == 0 and q.shape[-1] % columns == 0:
        blocks = (*q.shape[:-2], q.shape[-2] // rows, rows, q.shape[-1] // columns, columns)
        return q.float().view(blocks).mul_(scale[..., :, None, :, None]).view(q.shape).to(dtype)
    scale = scale.repeat_interleave(rows, -2)[..., : q.shape[-2], :]
    return q.float().mul_(scale.repeat_interleave(columns, -1)[..., : q.shape[-1]]).to(dtype)


def block_size(size: int, count: int, block: int = BLOCK) -> int:
    """How long the blocks are of which `count` cover `size`. Raises ValueError if that cannot be said."""
    if count > 0 and -(-size // block) == count:
        return block
    if count > 0 and size % count == 0:
        return size // count
    raise ValueError(f"{count} scales for {size} numbers in blocks of {block}")


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """The powers of two that E8M0 bytes stand for, float32 (OCP Microscaling Formats, section 5.4.1).

    255, which stands for no number, becomes infinite.
    """
    bits = scale.int() << 23
    return bits.masked_fill_(scale == 0, 1 << 22).view(torch.float32)  # 2^-127 is below the normal numbers
