"""Quantizing blocks to three or two bits, each with the step and zero that have the least squared error.

On the CPU the C++ library does it (`native/src/low_encode.h`). On a GPU, or if the library was not compiled,
torch does it and gets the same bytes: every operation is rounded by itself, and a block's errors are added in
the order of its columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_local.offload.native.library import DTYPES, FORMATS, check, library
from moe_local.offload.system.threads import kernel_threads


class LowFormat(NamedTuple):
    """Weight = row scale * step * (level - zero); codes select levels, a block's scale byte step and zero."""

    name: str
    block: int
    """Columns of a row that share a scale byte."""
    levels: tuple[int, ...]
    """Integers from 0 up, by which kernels multiply directly."""
    zero: float
    zero_step: float
    """A block's zero is zero + zero_step * the byte's upper half."""

    @property
    def planes(self) -> int:
        """How many 32-bit words a block has: one per 16 codes for their low two bits and, with three bits,
        one for all third bits."""
        return 1 if len(self.levels) == 4 else 3

    @property
    def zeros(self) -> tuple[float, ...]:
        return tuple(self.zero + self.zero_step * number for number in range(16))

    def blocks(self, cols: int) -> int:
        return -(-cols // self.block)


Q2 = LowFormat("q2", 16, (0, 1, 2, 3), -3 / 128, 13 / 64)
Q3 = LowFormat("q3", 32, (0, 3, 5, 7, 9, 11, 13, 16), 2.375, 0.75)
"""The levels are near the Lloyd-Max levels for normal weights, as multiples of half the distance between
inner ones."""

STEPS = tuple(number / 256 for number in (8, 10, 13, 16, 20, 26, 32, 40, 52, 64, 80, 104, 128, 160, 208, 256))
"""The steps that the lower half of a scale byte stands for: three per octave."""

TRIES = 5
"""How many steps are tried: the first that reaches the block's range, and those below it."""

SMALLEST = 1e-37
"""Row scales below this become zero, and so do the row's weights."""

LOW_CHUNK = 1 << 16
"""How many weights torch quantizes at a time; it needs some 60 bytes per weight."""

LOW_DEVICE_CHUNK = 1 << 22
"""The same on a GPU."""

THIRD_BITS = tuple(8 * (k % 16 // 4) + 4 * (k // 16) + k % 4 for k in range(32))
"""The position of code k's third bit in its word, such that one shift aligns the third bits of the codes in
all four bytes; see native/src/low.h."""


class LowParts(NamedTuple):
    """A matrix [M, N] with `blocks` blocks per row, as the C++ library reads it; contiguous."""

    q: torch.Tensor
    """uint8 [M, planes, 4 * blocks], little-endian words."""
    scale: torch.Tensor
    """uint8 [M, blocks]."""
    row_scale: torch.Tensor
    """float32 [M]."""


def quantize_rows(weights: torch.Tensor, format: LowFormat, out: LowParts) -> None:
    """Fill `out`, on the CPU, from weights [M, N] of any floating dtype on any device.

    A row with NaN or infinity gets a scale that is not finite, as does one whose range overflows float32. The
    bytes are the same on every device and for any number of threads.
    """
    weights = weights.detach()
    compiled = library() if weights.device.type == "cpu" else None
    if compiled is None:
        quantize_rows_in_torch(weights, format, out)
        return
    if weights.dtype not in DTYPES:
        weights = weights.float()
    weights = weights.contiguous()
    status = compiled.moe_low_encode(
        weights.data_ptr(),
        DTYPES[weights.dtype],
        *weights.shape,
        FORMATS[format.name],
        *(part.data_ptr() for part in out),
        kernel_threads(),
    )
    check(status)


def quantize_rows_in_torch(weights: torch.Tensor, format: LowFormat, out: LowParts) -> None:
    """`quantize_rows` without the library."""
    rows, cols = weights.shape
    device = weights.device
    step = max(1, (LOW_CHUNK if device.type == "cpu" else LOW_DEVICE_CHUNK) // max(1, cols))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        _quantize(weights[part].float(), format, LowParts(*(tensor[part] for tensor in out)))


def _quantize(weights: torch.Tensor, format: LowFormat, out: LowParts) -> None:
    rows, cols = weights.shape
    whole = cols // format.block
    cuts = [(0, whole, weights[:, : whole * format.block].reshape(rows, whole, format.block))]
    if cols % format.block:
        cuts.append((whole, whole + 1, weights[:, whole * format.block :].unsqueeze(1)))
    largest = torch.cat([_ranges(block, format) for _, _, block in cuts], 1).amax(1)
    finite = weights.isfinite().all(1)
    out.row_scale.copy_(torch.where(finite, torch.where(largest < SMALLEST, 0.0, largest), torch.nan))
    good = finite & (largest >= SMALLEST) & largest.isfinite()
    inverse = (1.0 / largest.where(good, torch.ones_like(largest)))[:, None, None]
    words = torch.zeros(rows, format.planes, format.blocks(cols), dtype=torch.int32, device=weights.device)
    for first, last, block in cuts:
        if last == first:
            continue
        values = (block * inverse).where(good[:, None, None], torch.zeros_like(block))
        scales, codes = _search(values.flatten(0, 1), format)
        out.scale[:, first:last].copy_((scales.view(rows, -1) * good[:, None]).to(torch.uint8))
        words[:, :, first:last] = _words(codes, format).view(rows, -1, format.planes).transpose(1, 2)
    words *= good[:, None, None]
    out.q.copy_(words.view(torch.uint8))


def _ranges(blocks: torch.Tensor, format: LowFormat) -> torch.Tensor:
    """[M, blocks, n] -> [M, blocks]: the step that is needed to reach a block's smallest and largest
    weights."""
    top = float(format.levels[-1])
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    return torch.maximum((high - low) * (1 / top), torch.maximum(high, -low) * (1 / (top - format.zero)))


def _search(blocks: torch.Tensor, format: LowFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized weights [B, n] -> the best scale bytes, int64 [B], and codes, int64 [B, n]."""
    device = blocks.device
    steps, zeros = (torch.tensor(numbers, device=device) for numbers in (STEPS, format.zeros))
    levels = torch.tensor(format.levels, dtype=torch.float32, device=device)
    ranges = _ranges(blocks.unsqueeze(0), format)[0]
    top = (steps < ranges[:, None]).sum(1).clamp(max=len(STEPS) - 1)
    errors = torch.full((len(blocks), TRIES, len(zeros)), torch.inf, device=device)
    for k in range(TRIES):
        step = steps[(top - k).clamp(min=0)][:, None]
        total = torch.zeros(len(blocks), len(zeros), device=device)
        for i in range(blocks.shape[1]):
            at = blocks[:, i, None] * (1.0 / step) + zeros
            off = torch.full_like(at, torch.inf)
            for level in levels:
                off = torch.minimum(off, (at - level).square())
            total += off
        errors[:, k] = torch.where((top >= k)[:, None], total * (step * step), torch.inf)
    flat = errors.flatten(1)
    number = torch.arange(flat.shape[1], device=device)
    best = torch.where(flat == flat.amin(1, keepdim=True), number, len(number)).amin(1)
    step_code, zero_code = top - best // len(zeros), best % len(zeros)
    at = blocks * (1.0 / steps[step_code])[:, None] + zeros[zero_code][:, None]
    bounds = (levels[1:] + levels[:-1]) / 2
    return zero_code << 4 | step_code, (at.unsqueeze(2) > bounds).sum(2)


def _words(codes: torch.Tensor, format: LowFormat) -> torch.Tensor:
    """Codes [B, n] -> int32 [B, planes]."""
    codes = torch.nn.functional.pad(codes, (0, format.block - codes.shape[1]))
    places = 2 * torch.arange(16, device=codes.device)
    words = ((codes & 3).view(len(codes), -1, 16) << places).sum(2)
    if format.planes == 3:
        thirds = (codes >> 2 << torch.tensor(THIRD_BITS, device=codes.device)).sum(1, keepdim=True)
        words = torch.cat([words, thirds], 1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
