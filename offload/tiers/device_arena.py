"""Slots in device memory, in segments that can be freed one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_local.cache.errors import DoesNotFitError
from moe_local.cache.ladder import arena_bytes
from moe_local.offload.tiers.arena import Arena, Strides, sizes_of, views_of
from moe_local.offload.tiers.device import Device

SEGMENT_BYTES = 256 << 20
"""About the size of a segment, which is what is freed at a time: at most this plus one expert."""

SEGMENTS = 32
"""A small arena has about so many segments, so that it can shrink in small steps, too."""


@dataclass(slots=True)
class _Segment:
    """Consecutive slots of a device, in the order of turns, in one allocation, which it owns."""

    slots: list[tuple[int, int]]
    """(layer, slot) in the order of their memory."""
    nbytes: int


class DeviceArena(Arena):
    """An arena in the memory of one or more devices, of exact size.

    A layer's slots are on its device. On each device slots take turns: slot 0 of every layer, slot 1 of every
    layer, and so on, cut into segments that are allocations of their own. `give_back` frees a device's last
    segment, so that all its layers shrink evenly, the highest slots and, among these, the last layers first.
    The addresses of the remaining slots never change.
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
        """`device`: one for all layers, or one per layer.

        If a device runs out of memory, the arena has fewer slots, provided that every layer has `least` of
        them (None: as many as asked for) with `spare` bytes left free. Otherwise raises DoesNotFitError,
        with nothing allocated.
        """
        self.devices = per_layer(device, len(strides))
        self._least = tuple(slots if least is None else least)
        self._sizes = sizes_of(slots, strides)
        """Bytes of each requested slot."""
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
        """Bytes of all slots now."""
        return arena_bytes(self.slots, self._sizes)

    def next_to_go(self, device: Device) -> Mapping[int, int] | None:
        """The slots left to each layer that has some in the device's last segment, once that is freed.

        None if it must not be freed: a layer would have fewer than its least.
        """
        segments = self._segments[device]
        if not segments:
            return None
        left: dict[int, int] = {}
        for layer, slot in segments[-1].slots:
            left[layer] = min(slot, left.get(layer, slot))
        return left if all(count >= self._least[layer] for layer, count in left.items()) else None

    def give_back(self, device: Device) -> int:
        """Free the device's last segment, whose slots must no longer be read or written; its bytes."""
        segment = self._segments[device].pop()
        for layer, slot in reversed(segment.slots):
            if slot != len(self._buffers[layer]) - 1:
                raise RuntimeError(f"slot {slot} of layer {layer} is given back before those above it")
            self._buffers[layer].pop()
        return segment.nbytes

    def close(self) -> None:
        """Free the memory, and let other programs have it. Idempotent."""
        super().close()
        held = [device for device, segments in self._segments.items() if segments]
        self._segments = {device: [] for device in self._segments}
        for device in held:
            with contextlib.suppress(RuntimeError):  # a lost device has nothing to give back
                device.trim()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the segments hold exactly the existing slots, in the order of turns."""
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
        """These slots in the order of turns, cut into segments of at least `size` bytes."""
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
    """One device per layer; a single one is repeated."""
    return tuple(device) if isinstance(device, Sequence) else (device,) * layers
