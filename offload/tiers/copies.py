"""Experts on their way from host memory to a device: copies with events, behind a tier that may read."""

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
"""How often copies are looked at while a read from disk is waited for: nothing wakes a host for both."""

_Place = tuple[int | Device, int]
"""What tells slots apart: those of a layer, and those of the ring, which are of all layers of a device."""


class Watch(Protocol):
    """Whoever wants to know what the link does."""

    def issued(self, key: ExpertKey, nbytes: int) -> None:
        """A copy was given to the link."""

    def copied(self, key: ExpertKey, nbytes: int, seconds: float) -> None:
        """A copy has ended, which ran for so long. To one device in the order in which they were issued."""


class CopyLoad(Load):
    """A load from the tier below, over the copy stream."""

    __slots__ = ("lower_held", "slot")

    def __init__(self, key: ExpertKey, nbytes: int, priority: int, slot: int) -> None:
        super().__init__(key, nbytes, priority)
        self.slot = slot
        self.lower_held = False
        """Whether the expert is pinned in the tier below."""


class CopySource:
    """Copies experts from a tier in host memory to a device, or each layer's to its own, most urgent first.

    A load passes through: waiting (the tier below has no slot for it yet, or reads it from its own
    source), copying (issued on the copy stream, its event pending), finished. The expert stays pinned
    below until the copy has ended, so its bytes cannot be replaced under the copy engine; the copy waits
    for the slot's last reader, so no kernel loses its weights. What is staged here is staged below, too, if
    it is not there: a prompt flushes neither tier.
    """

    def __init__(
        self,
        lower: Tier,
        arena: Slots,
        device: Device | Sequence[Device],
        nbytes: Callable[[ExpertKey], int],
    ) -> None:
        """`device`: one for all layers, or each layer's."""
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
        """Slots whose last readers the device did not mark when it was asked to."""

    def read_by(self, layer: int, slots: Sequence[int]) -> None:
        """All kernels that read these slots have been given to the device by now."""
        places = [self._place(layer, slot) for slot in slots]
        try:
            event = self._devices[layer].record()
        except BaseException:
            self._unmarked.update(places)
            raise
        for place in places:
            self._readers[place] = event

    def forget(self, layer: int, first: int) -> None:
        """Block until nobody reads or writes the layer's slots from `first` on; no load goes there now."""
        for load in [*self._copying]:  # claimed before its end
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
        if isinstance(load, CopyLoad) and priority < load.priority and not load.finished:
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
        """Block until a load finished or its copy was issued, which is as good: kernels can wait for that."""
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
                with contextlib.suppress(RuntimeError):  # a device that is gone does not write either
                    copying.event.synchronize()
            self._release_lower(copying)
            self._finish(copying, LoadState.DONE)
        self._copying.clear()
        self._readers.clear()
        self._unmarked.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every load that needs its expert below has it pinned there."""
        for load in (*self._waiting, *self._copying):
            held = self._lower.cache.pins(*load.key) > 0
            if load.lower_held and not held:
                raise RuntimeError(f"{load.key} is on its way to the device and not pinned below")
        for load in self._copying:
            if not load.lower_held or not self._lower.cache.is_resident(*load.key):
                raise RuntimeError(f"{load.key} is being copied and not held below")

    def _advance(self, load: CopyLoad) -> None:
        """Move a waiting load on: pin it below, and issue its copy once it is there."""
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
            load.lower_held = False  # the tier below has given the expert up, and with it our pin
            self._fail(load, error)
            return
        if there:
            self._issue(load)

    def _pass_through(self, load: CopyLoad) -> None:
        """Pin the expert of a staged load below where it is, or stage it, if there is room."""
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
        except (RuntimeError, MemoryError) as error:  # torch's errors of a device are RuntimeErrors
            self._release_lower(load)
            self._fail(load, _failure(load.key, error))
            return
        self._readers.pop(self._place(layer, load.slot), None)
        load.state = LoadState.RUNNING
        load.cause = "demand"  # from here on it is the link that is waited for, not the disk
        self._waiting.remove(load)
        self._copying.append(load)
        self.bytes_copied += load.nbytes
        if self.watch is not None:
            self.watch.issued(load.key, load.nbytes)

    def _mark(self, layer: int) -> None:
        """Mark readers that could not be marked before: what the device was given by now includes them."""
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
