"""The memory of one tier's slots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from moe_local.offload.tiers.device import Device, HostMemory

PIN_BYTES = 1 << 30
"""Memory is pinned in ranges of about this size, so that a refusal half-way leaves the first ones pinned."""


class Arena:
    """Slots of fixed stride for every MoE layer, in one allocation of the exact size.

    Layer l has `slots[l]` slots of `strides[l]` bytes each (its largest expert). Buffers are views, made
    once: nothing is allocated afterwards. The arena owns the memory until `close`.
    """

    def __init__(self, slots: Sequence[int], strides: Sequence[int], memory: torch.Tensor) -> None:
        self.nbytes = arena_bytes(slots, strides)
        if memory.numel() < self.nbytes:
            raise ValueError(f"an arena of {self.nbytes} bytes does not fit in {memory.numel()}")
        self._offsets: list[list[int]] = []
        self._buffers: list[list[torch.Tensor]] = []
        offset = 0
        for count, stride in zip(slots, strides, strict=True):
            self._offsets.append([offset + i * stride for i in range(count)])
            self._buffers.append([memory[start : start + stride] for start in self._offsets[-1]])
            offset += count * stride
        self.strides = tuple(strides)
        self.device = memory.device

    def buffer(self, layer: int, slot: int) -> torch.Tensor:
        """uint8 [strides[layer]], a view of the slot."""
        return self._buffers[layer][slot]

    def offset(self, layer: int, slot: int) -> int:
        """Where the slot starts, in bytes from the arena's start."""
        return self._offsets[layer][slot]

    def close(self) -> None:
        """Give the memory up. Idempotent."""
        self._buffers = []


class HostArena(Arena):
    """An arena in RAM, page-aligned, pinned for copies to a CUDA device if asked."""

    def __init__(self, slots: Sequence[int], strides: Sequence[int], *, pin: bool = False) -> None:
        self.memory = HostMemory(arena_bytes(slots, strides))
        super().__init__(slots, strides, self.memory.tensor)
        if pin:
            self.memory.pin(self.cuts(PIN_BYTES))

    def cuts(self, nbytes: int) -> list[int]:
        """0, the arena's end, and slot starts between, about `nbytes` apart: no slot crosses a cut."""
        cuts = [0]
        for offset in itertools.chain.from_iterable(self._offsets):
            if offset - cuts[-1] >= nbytes:
                cuts.append(offset)
        return [*cuts, self.nbytes] if self.nbytes else cuts

    def view(self, layer: int, slot: int) -> memoryview:
        """The slot's bytes, writable, for reading a file straight into it."""
        return self.memory.view(self.offset(layer, slot), self.strides[layer])

    def close(self) -> None:
        super().close()
        self.memory.close()


class DeviceArena(Arena):
    """An arena in the memory of a device."""

    def __init__(self, slots: Sequence[int], strides: Sequence[int], device: Device) -> None:
        super().__init__(slots, strides, device.allocate(arena_bytes(slots, strides)))


def arena_bytes(slots: Sequence[int], strides: Sequence[int]) -> int:
    """What an arena of these slots takes."""
    return sum(count * stride for count, stride in zip(slots, strides, strict=True))
