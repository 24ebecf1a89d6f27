"""Quantization of NF4's scales to 8 bits: bitsandbytes' results, without waiting for its threads.

These threads synchronize after every call, which on an otherwise busy machine takes longer than quantizing
the matrix. bitsandbytes looks up numbers in a table whose resolution and rounding are its own implementation
details. So its steps are found by calling it: the least number that gets index 1, the least that gets index
2, and so on.
"""

from __future__ import annotations

from functools import cache

import torch

from moe_local.offload.native.library import check, library
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.code_tables import dynamic_map
from moe_local.offload.system.threads import kernel_threads

NESTED_BLOCK = 256
"""How many scales share one scale of their own."""

_ONE = 0x3F800000
"""The bits of 1.0."""


def quantize_scales(
    absmax: torch.Tensor, offset: torch.Tensor, q: torch.Tensor, nested: torch.Tensor
) -> None:
    """Fill `q`, uint8 [n], and `nested`, float32 [ceil(n / 256)], from the scales `absmax`, float32 [n].

    Bit-equal to torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, dynamic_map, 256). All tensors are
    on the CPU, finite and contiguous; `offset` is float32 []. Uses as many threads as torch is set to.
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
    """Float32 [255]: element i is the least number in a block, whose largest is 1, with index i + 1 or more.

    Infinity for indices that no number gets. None, permanently, if bitsandbytes turns out not to quantize by
    such steps. Needs the C++ library.
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
    """Whether these steps give bitsandbytes' results for a large sample of scales, with a block of zeros."""
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
    """The indices, uint8, and the scales of blocks that bitsandbytes computes."""
    code = dynamic_map(torch.device("cpu"))
    indices, scales = bitsandbytes_ops().quantize_blockwise.default(numbers, code, NESTED_BLOCK)
    return indices, scales


def _number(order: torch.Tensor) -> torch.Tensor:
    """The float32 number whose bits, without sign, are |order|, with the sign of `order`; at most 1."""
    magnitude = order.abs().clamp(max=_ONE).to(torch.int32).view(torch.float32)
    return torch.where(order < 0, -magnitude, magnitude)
