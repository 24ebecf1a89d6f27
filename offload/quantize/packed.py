"""Decoders of publishers' packed formats: bitsandbytes' 4 bits, GPTQ, AWQ, compressed-tensors and NVFP4.

Each has the parameters that its file states, and decodes the stored parts to float32 [out, in]. All multiply
a small integer, or a level from a table, with a scale in float32; 4-bit integers times 16-bit scales are
exact in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize.nvfp4 import DIVISOR, FACTOR, dequantize_nvfp4

AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of AWQ's word, from the lowest, holds each of its eight columns (the "gemm" layout)."""


class PackedDecoder(Protocol):
    """Decodes the parts of one weight, given in the order in which they were found."""

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """New float32 [out, in]. Raises CheckpointError, with half a line, for inconsistent parts."""


@dataclass(frozen=True, slots=True)
class BitsAndBytes4:
    """QuantState of bitsandbytes: 4-bit indices into a table, with the earlier weight in the upper half of a
    byte, and one scale per `block` weights in row-major order.

    Parts: bytes uint8, absmax, table float32 [16]. If the scales are quantized, too, `nested` is the size of
    their blocks, and nested absmax and nested table, float32 [256], follow; `offset` is added to the scales.
    """

    shape: tuple[int, ...]
    block: int
    nested: int = 0
    offset: float = 0.0

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        q, absmax, table = parts[:3]
        scale = absmax.float()
        if self.nested:
            nested_absmax, nested_table = parts[3:]
            coarse = nested_absmax.float().repeat_interleave(self.nested)[: absmax.numel()]
            scale = nested_table.float()[absmax.int()].mul_(coarse).add_(self.offset)
        levels = table.float()
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        numbers = pairs.index_select(0, q.flatten().int()).view(-1)
        whole = numbers.numel() // self.block * self.block
        numbers[:whole].view(-1, self.block).mul_(scale[: whole // self.block, None])
        numbers[whole:].mul_(scale[-1])
        return numbers[: math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True, slots=True)
class Gptq:
    """Parts: qweight int32 [in * bits / 32, out], qzeros int32 [G, out * bits / 32], scales [G, out] and, if
    the file has it, the group of each input, int32 [in].

    `less_one`: zeros are stored minus one, as in all files except those of "gptq_v2".
    """

    bits: int
    less_one: bool

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        qweight, qzeros, scales, *groups = parts
        words = unpack(qweight.unsqueeze(-1), self.bits)  # [in * bits / 32, out, numbers per word]
        q = words.transpose(0, 1).reshape(words.shape[1], -1)
        zeros = unpack(qzeros, self.bits)
        if self.less_one:
            zeros = (zeros + 1) & (2**self.bits - 1)
        return _scaled(q, zeros.T, scales.T, groups[0] if groups else None)


@dataclass(frozen=True, slots=True)
class Awq:
    """Parts: qweight int32 [in, out / 8], qzeros int32 [G, out / 8], scales [G, out]."""

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        qweight, qzeros, scales = parts
        return _scaled(_in_order(qweight).T, _in_order(qzeros).T, scales.T)


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """compressed-tensors. Parts: weight_packed int32 [out, in * bits / 32], weight_scale [out, G] and, if
    `zeros`, weight_zero_point, int8 [out, G] or packed along the rows, int32 [out * bits / 32, G]; then, if
    `grouped`, the group of each input. Signed numbers are stored plus half their range."""

    bits: int
    zeros: bool
    grouped: bool

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        packed, scale, *more = parts
        q, half = unpack(packed, self.bits), 2 ** (self.bits - 1)
        scale = scale.view(-1, scale.shape[-1]).expand(q.shape[0], -1)
        zeros = torch.full(scale.shape, half, dtype=torch.int16)
        if self.zeros:
            stored = more.pop(0)
            if stored.dtype == torch.int32:
                zeros = unpack(stored.T.contiguous(), self.bits).T[: q.shape[0]].short()
            else:
                zeros = stored.view(-1, stored.shape[-1]).expand_as(scale).short() + half
        return _scaled(q, zeros, scale, more[0] if self.grouped else None)


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Parts: int8 [out, in], scales [out, 1] or of one element, and perhaps zero points, int8, as many."""

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        q, scale, *zeros = parts
        numbers = q.float()
        if zeros:
            numbers.sub_(zeros[0].float())
        return numbers.mul_(scale.float())


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """Parts: uint8 [out, in / 2], scales E4M3 [out, in / 16], a second scale float32 of one element, by which
    the others are multiplied or, if `divides`, divided."""

    divides: bool

    @property
    def part(self) -> str:
        """What layouts call the second scale."""
        return DIVISOR if self.divides else FACTOR

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        q, scale, second = parts
        return dequantize_nvfp4(q, scale, second.view(1), divides=self.divides)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., n] -> new uint8 [..., 32 n / bits] of 4 or 8 bits each, lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets.clone()
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    nibbles = unpack(words, 4).view(*words.shape, 8)
    return nibbles[..., list(AWQ_COLUMNS)].flatten(-2)


def _scaled(
    q: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """(q - zero) * scale, float32 [out, in], from q [out, in] and zeros and scales [out, G]."""
    rows, columns = q.shape
    zeros, scale = zeros.float(), scale.float()
    length = columns // scale.shape[1]
    if groups is not None and not bool((groups < 0).all()):  # all -1: the groups are in order
        if int(groups.min()) < 0 or int(groups.max()) >= scale.shape[1]:
            raise CheckpointError(f"inputs are of groups up to {int(groups.max())}, of {scale.shape[1]}")
        if not torch.equal(groups, torch.arange(columns, dtype=groups.dtype) // length):
            index = groups.int()
            return q.float().sub_(zeros.index_select(1, index)).mul_(scale.index_select(1, index))
    numbers = q.float().contiguous().view(rows, scale.shape[1], length)
    numbers.sub_(zeros.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return numbers.view(rows, columns)
