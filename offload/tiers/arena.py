"""The memory of one tier's slots."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence

import torch

from moe_local.offload.tiers.device import HostMemory

PIN_BYTES = 256 << 20
"""Memory is pinned in ranges of about this size; if one is refused, those before it stay pinned."""


Strides = Sequence[int | Sequence[int]]
"""Bytes of each layer's slots: one number for all of them, or one for each, at least as many as it has."""


class Arena:
    """Slots of fixed sizes for every MoE layer.

    Buffers are views, made once: nothing is allocated afterwards. The arena owns the memory until `close`.
    """

    def __init__(
        self, strides: Strides, buffers: Sequence[Sequence[torch.Tensor]], device: torch.device
    ) -> None:
        """`buffers[layer][slot]`, uint8, as long as `strides` say; `device`: where the first layer's are."""
        self.strides = tuple(stride if isinstance(stride, int) else max(stride) for stride in strides)
        """Bytes of each layer's largest slot."""
        self.device = device
        self._buffers = [list(layer) for layer in buffers]

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of each layer."""
        return tuple(len(layer) for layer in self._buffers)

    def buffer(self, layer: int, slot: int) -> torch.Tensor:
        """uint8 [bytes of the slot], a view of it."""
        return self._buffers[layer][slot]

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self._buffers = [[] for _ in self._buffers]


class HostArena(Arena):
    """An arena in RAM, one allocation of the exact size, page-aligned; pinned for copies to a CUDA device if
    asked."""

    def __init__(self, slots: Sequence[int], strides: Strides, *, pin: bool = False) -> None:
        sizes = sizes_of(slots, strides)
        each = [size for layer in sizes for size in layer]
        self.nbytes = sum(each)
        self.memory = HostMemory(self.nbytes)
        starts = iter([0, *itertools.accumulate(each)])
        views = iter(views_of(self.memory.tensor, each))
        self._offsets = [[next(starts) for _ in range(count)] for count in slots]
        buffers = [[next(views) for _ in range(count)] for count in slots]
        super().__init__(strides, buffers, self.memory.tensor.device)
        if pin:
            self.memory.pin(self.cuts(PIN_BYTES))

    def offset(self, layer: int, slot: int) -> int:
        """Where the slot starts, in bytes from the arena's start."""
        return self._offsets[layer][slot]

    def cuts(self, nbytes: int) -> list[int]:
        """0, the arena's end, and slot starts between, about `nbytes` apart: no slot crosses a cut.

        Nor does a page of the system's, which may be larger than what slots are made of (64 KiB on some ARM
        machines): CUDA would refuse the second of two ranges that share one.
        """
        cuts = [0]
        for offset in itertools.chain.from_iterable(self._offsets):
            if offset - cuts[-1] >= nbytes and offset % mmap.PAGESIZE == 0:
                cuts.append(offset)
        return [*cuts, self.nbytes] if self.nbytes else cuts

    def view(self, layer: int, slot: int) -> memoryview:
        """The slot's bytes, writable, for reading a file straight into it."""
        return self.memory.view(self.offset(layer, slot), self.buffer(layer, slot).numel())

    def close(self) -> None:
        super().close()
        self.memory.close()


def views_of(memory: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Consecutive views of `memory`, of so many bytes each. Raises ValueError if it is too small."""
    ends = list(itertools.accumulate(sizes))
    if ends and ends[-1] > memory.numel():
        raise ValueError(f"slots of {ends[-1]} bytes do not fit in {memory.numel()}")
    return [memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def sizes_of(slots: Sequence[int], strides: Strides) -> list[list[int]]:
    """Bytes of each slot of each layer. Raises ValueError if some slot has none."""
    sizes = [
        [stride] * count if isinstance(stride, int) else list(stride[:count])
        for count, stride in zip(slots, strides, strict=True)
    ]
    if [len(layer) for layer in sizes] != list(slots):
        raise ValueError(f"{list(slots)} slots, of which {[len(layer) for layer in sizes]} have a size")
    return sizes
