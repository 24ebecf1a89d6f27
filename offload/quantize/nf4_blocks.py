"""NF4 quantization of blocks of 64 weights on the CPU: bitsandbytes' arithmetic in a fifth of its time.

bitsandbytes finds the level of each weight by binary search, in several copies of the whole matrix. Here
fifteen vectorized comparisons a weight do, in buffers that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch

from moe_local.offload.quantize.bnb import bitsandbytes_ops

BLOCK = 64
"""Weights that share one scale."""

CHUNK = 1 << 18
"""Weights quantized at a time; whole blocks. A thread's buffers take 14 bytes a weight."""

SMALLEST = 1e-38
"""Stands in for the scale of a block of zeros, as in bitsandbytes."""


def quantize_blocks(weights: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> None:
    """Fill `q`, uint8 [ceil(n / 2)], and `absmax`, float32 [ceil(n / 64)], from n weights of any shape.

    Bit-equal to torch.ops.bitsandbytes.quantize_4bit(weights, 64, "nf4", torch.uint8), on the CPU. A block
    with NaN or infinity gets an absmax that is not finite. Runs in as many threads as torch is set to,
    of its own: torch's, which meet after every operation, stall each other where cores are shared.
    """
    flat = weights.reshape(-1)
    whole = flat.numel() - flat.numel() % BLOCK
    starts = range(0, whole, CHUNK)
    threads = min(torch.get_num_threads(), len(starts))

    def work(number: int) -> None:
        buffers = _Buffers(min(CHUNK, whole))
        for start in starts[number::threads]:
            part = slice(start, min(start + CHUNK, whole))
            _quantize_chunk(flat[part], _part(q, part, 2), _part(absmax, part, BLOCK), buffers)

    with _one_torch_thread():
        if threads == 1:
            work(0)
        elif threads > 1:
            with ThreadPoolExecutor(threads, "quantize") as pool:
                list(pool.map(work, range(threads)))
    if whole < flat.numel():
        rest = flat[whole:].to("cpu", torch.float32)
        packed, scales = bitsandbytes_ops().quantize_4bit.default(rest, BLOCK, "nf4", torch.uint8)
        q[whole // 2 :].copy_(packed.view(-1))
        absmax[whole // BLOCK :].copy_(scales)


class _Buffers:
    """Working memory of one thread for chunks of up to `size` weights."""

    def __init__(self, size: int) -> None:
        self.scaled, self.above, self.level = (torch.empty(size) for _ in range(3))
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
    """The part of `tensor`, which has one element for `per` weights, that belongs to these weights."""
    return tensor[weights.start // per : weights.stop // per]


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Operations of this thread, and of threads that it starts meanwhile, run without torch's own threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _levels(scaled: torch.Tensor, above: torch.Tensor, level: torch.Tensor) -> None:
    """Fill `level` with the number, 0 to 15, of the nearest level; all three are float32 [n].

    It is the number of bounds below the weight. Comparing to floats is several times faster than to bools.
    """
    first, *rest = _bounds()
    torch.gt(scaled, first, out=level)
    for bound in rest:
        torch.gt(scaled, bound, out=above)
        level.add_(above)


def _pack(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [n] of 0 to 15 -> uint8 [n / 2], the earlier weight in the high half of a byte."""
    pairs = nibbles.view(torch.int16)  # little endian: the earlier weight is the low byte
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)


@cache
def _bounds() -> tuple[float, ...]:
    """The fifteen midpoints between neighbouring levels, rounded to float32."""
    bitsandbytes_ops()
    functional: Any = import_module("bitsandbytes.functional")
    levels: torch.Tensor = functional.get_4bit_type("nf4", device="cpu")
    return tuple(((levels[:-1] + levels[1:]) / 2).tolist())
