"""The memory of a tier with a staging ring: the slots of its layers, and slots that belong to no layer."""

from __future__ import annotations

from typing import Protocol

import torch

from moe_local.cache.errors import DoesNotFitError
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.device import Device
from moe_local.offload.tiers.device_arena import DeviceArena


class Slots(Protocol):
    """The memory of a tier's slots: an Arena, or one with a ring beside it."""

    @property
    def device(self) -> torch.device:
        """The device of the first layer's slots."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots now."""

    def buffer(self, layer: int, slot: int) -> torch.Tensor:
        """The slot, uint8, at least as long as any expert that the cache puts there."""

    def close(self) -> None:
        """Free the memory. Idempotent."""


class StagedArena:
    """An arena and a ring of slots -1, -2 ..., each as long as the longest slot of any layer. Owns both.

    If the arena is on several devices, each slot of the ring has memory on all of them, and a layer uses that
    on its own device; at most one of these is in use at a time. So the cache need not know which device a
    layer is on, and reading ahead for a layer of the next device works as on a single one.
    """

    def __init__(self, own: HostArena | DeviceArena, ring: HostArena | DeviceArena) -> None:
        """`ring`: one layer of slots, equally many, for each device of `own`, in the order of its layers."""
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
        """For each layer of `own`, the layer of the ring that is on the same device."""
        self.device = own.device

    @classmethod
    def beside(cls, own: DeviceArena, slots: int, stride: int) -> StagedArena:
        """With `slots` ring slots of `stride` bytes on each device of `own`; with none if one refuses."""
        devices = tuple(dict.fromkeys(own.devices))
        strides = [stride] * len(devices)
        try:
            return cls(own, DeviceArena([slots] * len(devices), strides, devices))
        except DoesNotFitError:  # prompts then use the layers' own slots
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
    """The device of each layer's slots."""
    return [*arena.devices] if isinstance(arena, DeviceArena) else [arena.device] * len(arena.strides)
