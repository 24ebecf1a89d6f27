"""The memory of one tier with a staging ring: the layers' slots, and some that belong to none."""

from __future__ import annotations

from typing import Protocol

import torch

from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.device_arena import DeviceArena


class Slots(Protocol):
    """Where a tier's experts lie; an Arena, or one with a ring beside it."""

    @property
    def device(self) -> torch.device:
        """Where the first layer's slots are."""

    @property
    def nbytes(self) -> int:
        """What all slots take now."""

    def buffer(self, layer: int, slot: int) -> torch.Tensor:
        """uint8, the slot, as long at least as any expert that the cache puts there."""

    def close(self) -> None:
        """Give the memory up. Idempotent."""


class StagedArena:
    """An arena and a ring of slots -1, -2 ..., as long as any layer's. Owns both."""

    def __init__(self, own: HostArena | DeviceArena, ring: HostArena | DeviceArena) -> None:
        """`ring` is an arena of one layer, on the same device."""
        if ring.strides[0] < max(own.strides) or ring.device != own.device:
            raise ValueError(f"a ring of {ring.strides} bytes on {ring.device} for slots of {own.strides}")
        self.own = own
        self._ring = ring
        self.device = own.device

    @property
    def nbytes(self) -> int:
        return self.own.nbytes + self._ring.nbytes

    def buffer(self, layer: int, slot: int) -> torch.Tensor:
        return self.own.buffer(layer, slot) if slot >= 0 else self._ring.buffer(0, ~slot)

    def close(self) -> None:
        self.own.close()
        self._ring.close()
