"""Copies of experts from host memory to a device, after the tier below has read them if necessary."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from moe_local.cache.errors import TransferError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.tiers.device import Device, Event
from moe_local.offload.tiers.device_arena import per_layer
from moe_local.offload.tiers.staging import Slots
from moe_local.offload.tiers.tiers import Tier
from moe_local.offload.tiers.transfer import Load, LoadState

POLL_SECONDS = 0.0003
"""How often to poll copies while waiting for a read from disk: no wait of the host covers both."""

_Place = tuple[int | Device, int]
"""Identifies a slot: (layer, slot), or (device, slot) for the ring, which all layers of a device share."""


class Watch(Protocol):
    """An observer of the link between host and device."""

    def issued(self, key: ExpertKey, nbytes: int) -> None:
        """A copy was issued."""

    def copied(self, key: ExpertKey, nbytes: int, seconds: float) -> None:
        """A copy has ended after so many seconds. For one device, called in the order of issue."""


class CopyLoad(Load):
    """A load from the tier below, over the copy stream."""

    __slots__ = ("lower_held", "slot")

    def __init__(self, key: ExpertKey, nbytes: int, priority: int, slot: int) -> None:
        super().__init__(key, nbytes, priority)
        self.slot = slot
        self.lower_held = False
        """Whether the expert is pinned in the tier below."""


class CopySource:
    """Copies experts from a tier in host memory to a device (or to the device of their layer), by priority.

    A load is first waiting (the tier below has no slot for it yet, or reads it from its own source), then
    copying (issued on the copy stream, its event pending), then finished. The expert stays pinned below until
    the copy has ended, so that its bytes are not overwritten while they are copied; the copy waits for the
    last kernel that reads the slot. An expert that is staged here and absent below is staged there, too, so a
    prompt flushes neither tier.
    """

    def __init__(
        self,
        lower: Tier,
        arena: Slots,
        device: Device | Sequence[Device],
        nbytes: Callable[[ExpertKey], int],
    ) -> None:
        """`device`: one for all layers, or one per layer."""
        self.finished: deque[Load] = deque()
        self.bytes_copied = 0
        self.watch: Watch | None = None
        self._lower = lower
        self._arena = arena
        self._devices = per_layer(device, lower.cache.layers)
        self._nbytes = nbytes
        self._waiting: list[CopyLoad] = []
        self._copying: list[CopyLoad] = []
        self._readers: dict[_Place, Event] = {}
        self._unmarked: set[_Place] = set()
        """Slots for whose last readers no event could be recorded."""

    def read_by(self, layer: int, slots: Sequence[int]) -> None:
        """Call after all kernels that read these slots were launched."""
        places = [self._place(layer, slot) for slot in slots]
        try:
            event = self._devices[layer].record()
        except BaseException:
            self._unmarked.update(places)
            raise
        for place in places:
            self._readers[place] = event

    def forget(self, layer: int, first: int) -> None:
        """Block until no kernel reads and no copy writes the layer's slots from `first` on.

        No load may be started into them meanwhile.
        """
        for load in [*self._copying]:  # a load can be claimed before its copy has ended
            if load.key.layer == layer and load.slot >= first and load.event is not None:
                load.event.synchronize()
        self.poll()
        self._mark(layer)
        for place in [place for place in self._readers if place[0] == layer and place[1] >= first]:
            self._readers[place].synchronize()
            del self._readers[place]

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._copying)

    def start(self, key: ExpertKey, slot: int, priority: int) -> Load:
        load = CopyLoad(key, self._nbytes(key), priority, slot)
        self._waiting.append(load)
        self._advance(load)
        return load

    def promote(self, load: Load, priority: int) -> None:
        if isinstance(load, CopyLoad) and priority < load.priority:
            load.priority = priority
            if load in self._waiting and load.lower_held and not self._lower.cache.is_resident(*load.key):
                self._lower.promote(load.key)

    def cancel(self, load: Load) -> None:
        if isinstance(load, CopyLoad) and load in self._waiting:  # a copy that was issued runs to its end
            self._waiting.remove(load)
            self._release_lower(load)
            self._finish(load, LoadState.CANCELLED)

    def poll(self) -> None:
        if not self._waiting and not self._copying:
            return
        self._lower.poll()
        for load in sorted(self._waiting, key=lambda load: load.priority):
            self._advance(load)
        for load in [load for load in self._copying if load.event is not None and load.event.query()]:
            if self.watch is not None and load.event is not None:
                self.watch.copied(load.key, load.nbytes, load.event.seconds())
            self._copying.remove(load)
            load.moved = load.nbytes
            self._release_lower(load)
            self._finish(load, LoadState.DONE)

    def wait(self, seconds: float) -> None:
        """Block until a load finished, or its copy was issued: kernels can be made to wait for that."""
        issued = self.bytes_copied
        self.poll()
        if self.finished or self.bytes_copied > issued:
            return
        if self._lower.loading:
            self._lower.source.wait(min(seconds, POLL_SECONDS) if self._copying else seconds)
        elif self._copying and self._copying[0].event is not None:
            self._copying[0].event.synchronize()
        self.poll()

    def close(self) -> None:
        for load in [*self._waiting]:
            self.cancel(load)
        for copying in self._copying:
            if copying.event is not None:
                with contextlib.suppress(RuntimeError):  # a lost device does not write any more
                    copying.event.synchronize()
            self._release_lower(copying)
            self._finish(copying, LoadState.DONE)
        self._copying.clear()
        self._readers.clear()
        self._unmarked.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the experts of all loads that need them below are pinned there."""
        for load in (*self._waiting, *self._copying):
            held = self._lower.cache.pins(*load.key) > 0
            if load.lower_held and not held:
                raise RuntimeError(f"{load.key} is on its way to the device and not pinned below")
        for load in self._copying:
            if not load.lower_held or not self._lower.cache.is_resident(*load.key):
                raise RuntimeError(f"{load.key} is being copied and not held below")

    def _advance(self, load: CopyLoad) -> None:
        """Advance a waiting load: pin its expert below, and issue the copy once it is resident there."""
        lower, key = self._lower, load.key
        if not load.lower_held and load.slot < 0 and lower.cache.staging.slots:
            self._pass_through(load)
            if not load.lower_held:
                return  # every slot below is in use; one comes free soon
        elif not load.lower_held:
            if lower.cache.shortage(key.layer, [key.expert]):
                return  # every slot below is being copied from or read into; one comes free soon
            acquired = lower.cache.acquire(key.layer, [key.expert])
            load.lower_held = True
            if acquired.load:
                lower.bring(key, acquired.slots[0], load.priority)
            elif acquired.joined:
                lower.promote(key, load.priority)
        try:
            there, _ = lower.claim(key)
        except TransferError as error:
            load.lower_held = False  # the tier below has dropped the expert, and with it our pin
            self._fail(load, error)
            return
        if there:
            self._issue(load)

    def _pass_through(self, load: CopyLoad) -> None:
        """Pin the expert of a staged load in the tier below, or stage it there if there is room."""
        lower, key = self._lower, load.key
        if lower.cache.slot_of(*key) is None:
            slot = lower.cache.staging.stage(*key)
            if slot is None:
                return
            load.lower_held = True
            lower.bring(key, slot, load.priority)
            return
        lower.cache.staging.pin(*key)
        load.lower_held = True
        if not lower.cache.is_resident(*key):
            lower.promote(key, load.priority)

    def _issue(self, load: CopyLoad) -> None:
        layer, expert = load.key
        lower_slot = self._lower.cache.slot_of(layer, expert)
        if lower_slot is None:
            raise RuntimeError(f"expert {load.key} is pinned below without a slot")
        source = self._lower.arena.buffer(layer, lower_slot)[: load.nbytes]
        destination = self._arena.buffer(layer, load.slot)[: load.nbytes]
        try:
            self._mark(layer)
            reader = self._readers.get(self._place(layer, load.slot))
            load.event = self._devices[layer].copy(destination, source, reader)
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeErrors for device errors
            self._release_lower(load)
            self._fail(load, _failure(load.key, error))
            return
        self._readers.pop(self._place(layer, load.slot), None)
        load.state = LoadState.RUNNING
        load.cause = "demand"  # from now on a wait is for the link, not for the disk
        self._waiting.remove(load)
        self._copying.append(load)
        self.bytes_copied += load.nbytes
        if self.watch is not None:
            self.watch.issued(load.key, load.nbytes)

    def _mark(self, layer: int) -> None:
        """Record the events that could not be recorded before; a later event covers those kernels, too."""
        if self._unmarked:
            event = self._devices[layer].record()
            for place in [place for place in self._unmarked if place[0] in (layer, self._devices[layer])]:
                self._readers[place] = event
                self._unmarked.discard(place)

    def _place(self, layer: int, slot: int) -> _Place:
        return (layer if slot >= 0 else self._devices[layer], slot)

    def _release_lower(self, load: CopyLoad) -> None:
        if load.lower_held:
            load.lower_held = False
            self._lower.give_up(load.key)

    def _fail(self, load: CopyLoad, error: TransferError) -> None:
        load.error = error
        self._waiting.remove(load)
        self._finish(load, LoadState.FAILED)

    def _finish(self, load: CopyLoad, state: LoadState) -> None:
        load.state = state
        self.finished.append(load)


def _failure(key: ExpertKey, error: Exception) -> TransferError:
    why = (str(error) or type(error).__name__).splitlines()[0]
    return TransferError(f"expert {key.expert} of MoE layer {key.layer} could not be copied: {why}")
