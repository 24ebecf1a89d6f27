"""The memory of one tier with a staging ring: the layers' slots, and some that belong to none."""

from __future__ import annotations

from typing import Protocol

import torch

from moe_local.offload.tiers.arena import Arena


class Slots(Protocol):
    """Where a tier's experts lie; an Arena, or one with a ring beside it."""

    device: torch.device
    nbytes: int

    def buffer(self, layer: int, slot: int) -> torch.Tensor:
        """uint8, the slot, as long as the layer's largest expert at least."""

    def close(self) -> None:
        """Give the memory up. Idempotent."""


class StagedArena:
    """An arena and a ring of slots -1, -2 ..., as long as any layer's. Owns both."""

    def __init__(self, own: Arena, ring: Arena) -> None:
        """`ring` is an arena of one layer, on the same device."""
        if ring.strides[0] < max(own.strides) or ring.device != own.device:
            raise ValueError(f"a ring of {ring.strides} bytes on {ring.device} for slots of {own.strides}")
        self._own = own
        self._ring = ring
        self.device = own.device
        self.nbytes = own.nbytes + ring.nbytes

    def buffer(self, layer: int, slot: int) -> torch.Tensor:
        return self._own.buffer(layer, slot) if slot >= 0 else self._ring.buffer(0, ~slot)

    def close(self) -> None:
        self._own.close()
        self._ring.close()
