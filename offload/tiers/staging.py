"""The memory of one tier with a staging ring: the layers' slots, and some that belong to none."""

from __future__ import annotations

from typing import Protocol

import torch

from moe_local.cache.errors import DoesNotFitError
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.device import Device
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
    """An arena and a ring of slots -1, -2 ..., as long as any layer's. Owns both.

    Where the arena is on several devices, each slot of the ring has memory on all of them, and a layer's is
    what is on its own: of that memory one at most is in use. So whoever deals slots out need not know where
    layers are, and what is read ahead for a layer of the next device takes its turn as on a single one.
    """

    def __init__(self, own: HostArena | DeviceArena, ring: HostArena | DeviceArena) -> None:
        """`ring`: for each device of `own`, in the order of its layers, a layer of equally many slots."""
        devices = _devices(own)
        if (
            min(ring.strides) < max(own.strides)
            or len(set(ring.slots)) != 1
            or _devices(ring) != list(dict.fromkeys(devices))
        ):
            raise ValueError(f"a ring of {ring.strides} bytes on {ring.device} for slots of {own.strides}")
        self.own = own
        self._ring = ring
        self._card = [_devices(ring).index(device) for device in devices]
        """Which layer of the ring's is that of each layer."""
        self.device = own.device

    @classmethod
    def beside(cls, own: DeviceArena, slots: int, stride: int) -> StagedArena:
        """With `slots` of `stride` bytes on each device of `own`; with none if one of these refuses them."""
        devices = tuple(dict.fromkeys(own.devices))
        strides = [stride] * len(devices)
        try:
            return cls(own, DeviceArena([slots] * len(devices), strides, devices))
        except DoesNotFitError:  # prompts go through the layers' own slots then
            return cls(own, DeviceArena([0] * len(devices), strides, devices))

    @property
    def ring_slots(self) -> int:
        return self._ring.slots[0]

    @property
    def nbytes(self) -> int:
        return self.own.nbytes + self._ring.nbytes

    def buffer(self, layer: int, slot: int) -> torch.Tensor:
        return self.own.buffer(layer, slot) if slot >= 0 else self._ring.buffer(self._card[layer], ~slot)

    def close(self) -> None:
        self.own.close()
        self._ring.close()


def _devices(arena: HostArena | DeviceArena) -> list[Device | torch.device]:
    """Where each layer's slots are."""
    return [*arena.devices] if isinstance(arena, DeviceArena) else [arena.device] * len(arena.strides)
