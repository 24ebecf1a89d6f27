"""NF4 quantization of blocks of 64 weights: bit-equal to bitsandbytes, and as fast as memory.

On the CPU the C++ library does it, or torch if that was not compiled. bitsandbytes finds the level of each
weight by binary search, with several copies of the whole matrix. Fifteen vectorized comparisons per weight,
in buffers that stay in the processor's cache, take a fifth of that time. On a GPU torch's binary search is
used.
"""

from __future__ import annotations

import threading
from functools import cache

import torch

from moe_local.offload.native.library import DTYPES, check, library
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.code_tables import nf4_levels
from moe_local.offload.quantize.parallel import for_each
from moe_local.offload.system.threads import kernel_threads

BLOCK = 64
"""Weights that share one scale."""

CHUNK = 1 << 18
"""How many weights are quantized at a time on the CPU; whole blocks. A thread's buffers take 14 bytes per
weight."""

DEVICE_CHUNK = 1 << 24
"""The same on other devices, where starting an operation costs more; takes some 17 bytes per weight."""

SMALLEST = 1e-38
"""Used instead of the scale of a block of zeros, as in bitsandbytes."""


def quantize_blocks(weights: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> None:
    """Fill `q`, uint8 [ceil(n / 2)], and `absmax`, float32 [ceil(n / 64)], from n weights of any shape.

    All three are on one device; `q` and `absmax` are contiguous. Bit-equal to
    torch.ops.bitsandbytes.quantize_4bit(weights, 64, "nf4", torch.uint8) on the CPU, on whatever device it
    runs. A block with NaN or infinity gets an absmax that is not finite. Uses as many threads as torch is set
    to.
    """
    compiled = library() if weights.device.type == "cpu" else None
    if compiled is None:
        quantize_blocks_in_torch(weights, q, absmax)
        return
    flat = weights.detach().reshape(-1)
    if flat.dtype not in DTYPES:
        flat = flat.float()
    assert q.numel() == -(-flat.numel() // 2)
    assert absmax.numel() == -(-flat.numel() // BLOCK)
    assert q.is_contiguous()
    assert absmax.is_contiguous()
    pointers = flat.data_ptr(), DTYPES[flat.dtype], flat.numel(), q.data_ptr(), absmax.data_ptr()
    check(compiled.moe_nf4_encode(*pointers, kernel_threads()))


def quantize_blocks_in_torch(weights: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> None:
    """`quantize_blocks` without the library, for GPUs and for CPUs without a compiled library."""
    flat = weights.detach().reshape(-1)
    whole = flat.numel() - flat.numel() % BLOCK
    quantize = _whole_blocks_in_threads if flat.device.type == "cpu" else whole_blocks_at_large
    quantize(flat[:whole], q[: whole // 2], absmax[: whole // BLOCK])
    if whole < flat.numel():  # the last block, in which bitsandbytes divides by the scale
        rest = flat[whole:].to("cpu", torch.float32)
        packed, scales = bitsandbytes_ops().quantize_4bit.default(rest, BLOCK, "nf4", torch.uint8)
        q[whole // 2 :].copy_(packed.view(-1))
        absmax[whole // BLOCK :].copy_(scales)


def whole_blocks_at_large(flat: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantize n weights, whole blocks, in few large operations on their device."""
    bounds = torch.tensor(_bounds(), device=flat.device)
    for start in range(0, flat.numel(), DEVICE_CHUNK):
        part = slice(start, min(start + DEVICE_CHUNK, flat.numel()))
        blocks = flat[part].to(torch.float32).view(-1, BLOCK)
        scales = _part(absmax, part, BLOCK)
        torch.amax(blocks.abs(), 1, out=scales)
        scaled = blocks * (1.0 / scales.clamp(min=SMALLEST)).unsqueeze(1)
        levels = torch.bucketize(scaled.view(-1), bounds, out_int32=True)
        _part(q, part, 2).copy_(_pack(levels.to(torch.uint8)))


def _whole_blocks_in_threads(flat: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantize n weights, whole blocks, on the CPU, in as many threads as torch is set to."""
    own = threading.local()

    def work(part: slice) -> None:
        if not hasattr(own, "buffers"):
            own.buffers = _Buffers(min(CHUNK, flat.numel()))
        _quantize_chunk(flat[part], _part(q, part, 2), _part(absmax, part, BLOCK), own.buffers)

    starts = range(0, flat.numel(), CHUNK)
    for_each([slice(start, min(start + CHUNK, flat.numel())) for start in starts], work)


class _Buffers:
    """Working memory of one thread for chunks of up to `size` weights."""

    def __init__(self, size: int) -> None:
        self.scaled, self.above, self.level = (torch.empty(size, dtype=torch.float32) for _ in range(3))
        self.nibbles = torch.empty(size, dtype=torch.uint8)


def _quantize_chunk(weights: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor, buffers: _Buffers) -> None:
    count = weights.numel()
    scaled, above, level = buffers.scaled[:count], buffers.above[:count], buffers.level[:count]
    scaled.copy_(weights)
    torch.amax(torch.abs(scaled, out=above).view(-1, BLOCK), 1, out=absmax)
    scaled.view(-1, BLOCK).mul_((1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(1))
    _levels(scaled, above, level)
    q.copy_(_pack(buffers.nibbles[:count].copy_(level)))


def _part(tensor: torch.Tensor, weights: slice, per: int) -> torch.Tensor:
    """The part of `tensor`, which has one element per `per` weights, that belongs to these weights."""
    return tensor[weights.start // per : weights.stop // per]


def _levels(scaled: torch.Tensor, above: torch.Tensor, level: torch.Tensor) -> None:
    """Fill `level` with the index, 0 to 15, of the nearest level; all three are float32 [n].

    The index is the number of bounds below the weight, and 15 for NaN, for which all comparisons are false.
    Writing the results of comparisons as floats is several times faster than as bools.
    """
    first, *rest = _bounds()
    torch.le(scaled, first, out=level)
    for bound in rest:
        torch.le(scaled, bound, out=above)
        level.add_(above)
    torch.sub(15.0, level, out=level)


def _pack(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [n] of 0 to 15 -> uint8 [n / 2], the earlier weight in the high half of a byte."""
    pairs = nibbles.view(torch.int16)  # little endian: the earlier weight is the low byte
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)


@cache
def _bounds() -> tuple[float, ...]:
    """The fifteen midpoints between neighbouring levels, rounded to float32."""
    levels = nf4_levels(torch.device("cpu"))
    return tuple(((levels[:-1] + levels[1:]) / 2).tolist())
