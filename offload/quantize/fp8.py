"""FP8 (E4M3) with a scale for each block, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moe_local.offload.quantize.layout import Layout, TensorSpec, make_layout
from moe_local.offload.quantize.parallel import for_rows
from moe_local.offload.quantize.views import check_finite, copy_exactly, segment_view, zero_padding

BLOCK = 128
"""Rows and columns of a block where a checkpoint does not say otherwise."""

LARGEST = 448.0
"""E4M3's largest number (OCP 8-bit Floating Point Specification, section 5)."""

SMALLEST_SCALE = 2.0**-126
"""That is written."""


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


class FP8Codec:
    """8.002 bits a weight: E4M3 with a float32 scale for 128 x 128 weights, laid out as DeepSeek-V3 is.

    E4M3 keeps a share of each weight, 1/16 at worst, over more than four orders of magnitude, so that smaller
    blocks would cost bits and gain nothing. Biases stay float32.
    """

    name = "fp8"
    exact = False

    def layout(self, tensors: Sequence[TensorSpec]) -> Layout:
        """Segments q and scale for a matrix, "values" for a bias."""
        parts: list[tuple[str, str, str, tuple[int, ...]]] = []
        for tensor in tensors:
            if len(tensor.shape) < 2:
                parts.append((tensor.name, "values", "float32", tensor.shape))
                continue
            rows, cols = tensor.shape
            parts.append((tensor.name, "q", "float8_e4m3fn", (rows, cols)))
            parts.append((tensor.name, "scale", "float32", (-(-rows // BLOCK), -(-cols // BLOCK))))
        return make_layout(self.name, tensors, parts)

    def encode(self, tensors: Mapping[str, torch.Tensor], layout: Layout, out: torch.Tensor) -> None:
        """Write the expert into `out`, uint8 [layout.nbytes] on the CPU.

        Raises CheckpointError for NaN and infinity. No number of q is NaN.
        """
        for tensor in layout.tensors:
            if len(tensor.shape) < 2:
                (segment,) = layout.parts(tensor.name)
                copy_exactly(tensor.name, tensors[tensor.name], segment_view(out, segment), "fp32")
            else:
                parts = {part.part: segment_view(out, part) for part in layout.parts(tensor.name)}
                _quantize(tensor.name, tensors[tensor.name], parts["q"], parts["scale"])
        zero_padding(out, layout)

    def decode(self, buffer: torch.Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """New tensors in `dtype` on the buffer's device and current stream."""
        from moe_local.offload.quantize.stored import StoredDecoder

        return StoredDecoder().decode(buffer, layout, dtype)


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
        # Above the subnormal numbers, so that both it and its inverse are precise.
        found = (blocks.amax((1, 3)) / LARGEST).clamp_(min=SMALLEST_SCALE)
        inverse = (1 / found).repeat_interleave(BLOCK, 0)[: len(values)]
        for block in range(found.shape[1]):
            part = slice(BLOCK * block, BLOCK * block + BLOCK)
            # Rounding may bring the largest a hair above what is there, never more.
            scaled = (values[:, part] * inverse[:, block : block + 1]).clamp_(-LARGEST, LARGEST)
            q[rows, part].copy_(scaled)
        scale[rows.start // BLOCK : -(-rows.stop // BLOCK)].copy_(found)

    for_rows(weights, work, BLOCK)
    if not bool(torch.isfinite(scale).all()):
        check_finite(name, weights)
