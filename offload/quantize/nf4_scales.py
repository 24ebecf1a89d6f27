"""Quantization of NF4's own scales to 8 bits: bitsandbytes' results, without the wait for its threads.

Those meet after every call, which on a machine that is busy otherwise takes longer than quantizing the matrix
does. It looks numbers up in a table made for the purpose, whose resolution and rounding are its own affair.
So it is asked itself where its steps are: the least number that gets index 1, the least that gets 2, and on.
"""

from __future__ import annotations

from functools import cache

import torch

from moe_local.offload.native.library import check, library
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.code_tables import dynamic_map
from moe_local.offload.system.threads import kernel_threads

NESTED_BLOCK = 256
"""Scales that share one scale of their own."""

_ONE = 0x3F800000
"""1.0 as bits."""


def quantize_scales(
    absmax: torch.Tensor, offset: torch.Tensor, q: torch.Tensor, nested: torch.Tensor
) -> None:
    """Fill `q`, uint8 [n], and `nested`, float32 [ceil(n / 256)], from the scales `absmax`, float32 [n].

    Bit-equal to torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, dynamic_map, 256). All on the CPU,
    finite and contiguous; `offset` is float32 []. Takes as many threads as torch is set to.
    """
    found = steps() if library() is not None else None
    if found is None:
        indices, scales = _ask(absmax - offset)
        q.copy_(indices)
        nested.copy_(scales)
    else:
        _quantize(absmax, float(offset), found, q, nested)


@cache
def steps() -> torch.Tensor | None:
    """Float32 [255]: the least number of a block whose largest is 1 that gets index i + 1 or more.

    Infinity for an index that none gets. None, for good, if bitsandbytes turns out to quantize in another way
    than by such steps. Needs the C++ library.
    """
    index = torch.arange(1, NESTED_BLOCK)
    low, high = torch.full_like(index, -_ONE), torch.full_like(index, _ONE + 1)
    while bool((low < high).any()):
        middle = (low + high) >> 1
        reached = _ask(torch.cat([torch.ones(1), _number(middle)]))[0][1:] >= index
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle + 1).minimum(high)
    found = torch.where(high > _ONE, torch.inf, _number(high))
    return found if _are_right(found) else None


def _are_right(found: torch.Tensor) -> bool:
    """Whether these steps give bitsandbytes' results for a sample of many scales, one block of it zeros."""
    if not torch.equal(found, found.sort().values):
        return False
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(64, NESTED_BLOCK, generator=generator) * torch.logspace(-6, 6, 64).unsqueeze(1)
    sample[7] = 0
    sample = sample.view(-1)[:-100]
    indices, scales = _ask(sample)
    q, nested = torch.empty_like(indices), torch.empty_like(scales)
    _quantize(sample, 0.0, found, q, nested)
    return torch.equal(q, indices) and torch.equal(nested, scales)


def _quantize(
    absmax: torch.Tensor, offset: float, found: torch.Tensor, q: torch.Tensor, nested: torch.Tensor
) -> None:
    compiled = library()
    assert compiled is not None
    assert all(tensor.is_contiguous() for tensor in (absmax, q, nested))
    pointers = found.data_ptr(), q.data_ptr(), nested.data_ptr()
    check(compiled.moe_scales_encode(absmax.data_ptr(), absmax.numel(), offset, *pointers, kernel_threads()))


def _ask(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' indices, uint8, and the blocks' scales."""
    code = dynamic_map(torch.device("cpu"))
    indices, scales = bitsandbytes_ops().quantize_blockwise.default(numbers, code, NESTED_BLOCK)
    return indices, scales


def _number(order: torch.Tensor) -> torch.Tensor:
    """The float32 number that has so many others between it and zero, |order| up to that of 1; above, 1."""
    magnitude = order.abs().clamp(max=_ONE).to(torch.int32).view(torch.float32)
    return torch.where(order < 0, -magnitude, magnitude)
