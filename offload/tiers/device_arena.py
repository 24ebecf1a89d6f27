"""Slots in the memory of devices, in segments that can be given back one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_local.cache.errors import DoesNotFitError
from moe_local.cache.ladder import arena_bytes
from moe_local.offload.tiers.arena import Arena, Strides, sizes_of, views_of
from moe_local.offload.tiers.device import Device

SEGMENT_BYTES = 256 << 20
"""About the size of a segment: what is given back at a time is at most this and one expert more."""

SEGMENTS = 32
"""A small arena has about so many segments, so that it can give way in small steps, too."""


@dataclass(slots=True)
class _Segment:
    """Consecutive slots of a device's turn, in one allocation. Owns nothing but it."""

    slots: list[tuple[int, int]]
    """(layer, slot) in the order in which they lie in memory."""
    nbytes: int


class DeviceArena(Arena):
    """An arena in the memory of one or more devices, of exact size.

    A layer's slots are on its device. On each device slots take turns: slot 0 of every layer, slot 1 of every
    layer, and so on, cut into segments that are allocations of their own. `give_back` frees a device's last
    segment, so that memory comes back from all its layers evenly, the highest slots and, among these, the
    last layers first. No address of a slot that stays ever changes.

    `generation` counts the changes: whoever keeps addresses of slots, or counts on every expert having one,
    compares it with what it was.
    """

    def __init__(
        self,
        slots: Sequence[int],
        strides: Strides,
        device: Device | Sequence[Device],
        *,
        least: Sequence[int] | None = None,
        spare: int = 0,
    ) -> None:
        """`device`: one for all layers, or each layer's.

        Where a device refuses memory half-way the arena goes on with fewer slots, if every layer has `least`
        of them (None: as many as asked for) when `spare` bytes have been left to others. Raises
        DoesNotFitError otherwise, with nothing allocated.
        """
        self.devices = per_layer(device, len(strides))
        self.generation = 0
        self._least = tuple(slots if least is None else least)
        self._sizes = sizes_of(slots, strides)
        """Bytes of each slot that was asked for."""
        super().__init__(strides, [[] for _ in strides], self.devices[0].torch_device)
        self._segments: dict[Device, list[_Segment]] = {device: [] for device in self.devices}
        try:
            for each in self._segments:
                self._fill(each, slots, spare)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """What all slots take now."""
        return arena_bytes(self.slots, self._sizes)

    def next_to_go(self, device: Device) -> Mapping[int, int] | None:
        """Slots left, by layer, once the device's last segment has been given back.

        None where it cannot be: a layer would have less than its least.
        """
        segments = self._segments[device]
        if not segments:
            return None
        left: dict[int, int] = {}
        for layer, slot in segments[-1].slots:
            left[layer] = min(slot, left.get(layer, slot))
        return left if all(count >= self._least[layer] for layer, count in left.items()) else None

    def give_back(self, device: Device) -> int:
        """Free the device's last segment, whose slots nobody reads or writes any more; its bytes."""
        segment = self._segments[device].pop()
        for layer, slot in reversed(segment.slots):
            if slot != len(self._buffers[layer]) - 1:
                raise RuntimeError(f"slot {slot} of layer {layer} is given back before those above it")
            self._buffers[layer].pop()
        self.generation += 1
        return segment.nbytes

    def close(self) -> None:
        super().close()
        self._segments = {device: [] for device in self._segments}

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the segments hold exactly the slots there are, in turn."""
        for device, segments in self._segments.items():
            held = [place for segment in segments for place in segment.slots]
            slots = [count if self.devices[layer] is device else 0 for layer, count in enumerate(self.slots)]
            if held != list(_turns(slots)):
                raise RuntimeError(f"segments hold {held}, there are {slots} slots")

    def _fill(self, device: Device, slots: Sequence[int], spare: int) -> None:
        """Allocate the device's segments, as many as it has memory for."""
        mine = [count if self.devices[layer] is device else 0 for layer, count in enumerate(slots)]
        size = min(SEGMENT_BYTES, arena_bytes(mine, self._sizes) // SEGMENTS)
        refused: DoesNotFitError | None = None
        for segment in self._cut(mine, size):
            try:
                self._add(device, segment)
            except DoesNotFitError as error:
                refused = error
                break
        if refused is None:
            return
        left = 0
        while left < spare and self.next_to_go(device) is not None:
            left += self.give_back(device)
        enough = all(
            have >= least or self.devices[layer] is not device
            for layer, (have, least) in enumerate(zip(self.slots, self._least, strict=True))
        )
        if left < spare or not enough:
            raise refused
        device.trim()

    def _add(self, device: Device, segment: _Segment) -> None:
        memory = device.allocate(segment.nbytes)
        views = views_of(memory, [self._sizes[layer][slot] for layer, slot in segment.slots])
        for (layer, _), view in zip(segment.slots, views, strict=True):
            self._buffers[layer].append(view)
        self._segments[device].append(segment)

    def _cut(self, slots: Sequence[int], size: int) -> Iterator[_Segment]:
        """The turns over these slots, in segments of `size` bytes at least."""
        segment = _Segment([], 0)
        for layer, slot in _turns(slots):
            segment.slots.append((layer, slot))
            segment.nbytes += self._sizes[layer][slot]
            if segment.nbytes >= size:
                yield segment
                segment = _Segment([], 0)
        if segment.slots:
            yield segment


def _turns(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(layer, slot): slot 0 of every layer that has one, then slot 1, and so on."""
    for slot in range(max(slots, default=0)):
        yield from ((layer, slot) for layer, count in enumerate(slots) if slot < count)


def per_layer(device: Device | Sequence[Device], layers: int) -> tuple[Device, ...]:
    """The device of each layer, where one stands for all."""
    return tuple(device) if isinstance(device, Sequence) else (device,) * layers
