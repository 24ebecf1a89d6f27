"""One tier of fast memory: which expert is in which slot, the slots' memory, and where misses come from.

Tiers recurse: `vram` loads from `ram` through a CopySource, `ram` loads from disk through a FileSource.
The same class, cache and counters serve all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from moe_local.cache.errors import TransferError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.keys import ExpertKey
from moe_local.offload.interrupt import check as check_interrupt
from moe_local.offload.tiers.arena import Arena
from moe_local.offload.tiers.device import Device, Event, Waited
from moe_local.offload.tiers.transfer import DEMAND, Load, LoadState, Source

PRELOAD_WINDOW = 16
"""Experts under way at a time while a tier is filled: enough to keep the threads busy."""

POLL_SECONDS = 0.0003
"""How often copies are looked at while a read from disk is waited for: nothing wakes a host for both."""


class Tier:
    """A cache of experts over an arena of slots, filled from a source.

    Owned and called by one thread, the engine's. What a source does in other threads reaches the cache
    only through `poll`, so neither needs a lock. Every expert that the cache calls loading has exactly
    one load here, and the other way round (`check_integrity`).
    """

    def __init__(
        self, cache: ExpertCache, arena: Arena, source: Source, device: Device | None = None
    ) -> None:
        self.cache = cache
        self.arena = arena
        self.source = source
        self.device = device
        """The device whose kernels read the arena asynchronously; None where the host itself computes."""
        self._loads: dict[ExpertKey, Load] = {}
        self._failures: dict[ExpertKey, TransferError] = {}

    def poll(self) -> None:
        """Take note of loads that came to their end. Does not block."""
        self.source.poll()
        finished = self.source.finished
        while finished:
            self._settle(finished.popleft())

    def bring(self, key: ExpertKey, slot: int, priority: int) -> None:
        """Start the load of an expert that the cache has just put into `slot`."""
        self._failures.pop(key, None)
        self._loads[key] = self.source.start(key, slot, priority)

    def promote(self, key: ExpertKey, priority: int = DEMAND) -> None:
        """An expert under way is wanted sooner than it was; DEMAND: now."""
        load = self._loads[key]
        load.joined = True
        self.source.promote(load, priority)

    def cancel(self, key: ExpertKey) -> None:
        """Give a load under way up, if it can be; its slot is free once the load has ended."""
        self.source.cancel(self._loads[key])

    def give_up(self, key: ExpertKey) -> None:
        """Take back one pin of an expert; if it was the last and the expert is still under way, stop that."""
        if self._failures.pop(key, None) is not None:
            return  # it failed, and its pins went with it
        self.cache.release(key.layer, [key.expert])
        if key in self._loads and not self.cache.pins(*key):
            self.cancel(key)

    def cause(self, key: ExpertKey) -> str:
        """What a wait for this expert's load is charged to: a field of StallSeconds."""
        return self._loads[key].cause

    @property
    def loading(self) -> bool:
        """Whether anything is under way."""
        return bool(self._loads)

    @property
    def bytes_in_flight(self) -> int:
        """Bytes that loads under way have still to bring."""
        return sum(load.nbytes - load.moved for load in self._loads.values())

    def claim(self, key: ExpertKey) -> tuple[bool, Waited | None]:
        """Whether kernels may be given the expert now, and the device's wait for its copy, if any.

        True when it is resident, or when its copy has been issued: then the compute stream is told to
        wait for the copy, and the host goes on. Raises the load's error if it failed.
        """
        if error := self._failures.pop(key, None):
            raise error
        if self.cache.is_resident(*key):
            return True, None
        event = self._loads[key].event
        if event is None or self.device is None:
            return False, None
        waited = self.device.wait(event)
        del self._loads[key]
        self.cache.complete(*key)
        return True, waited

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Bring every expert into a slot of its own; `progress` gets (experts brought, experts in all).

        For a tier with as many slots as experts. Blocks. Raises the first load's error.
        """
        cache = self.cache
        keys = deque(ExpertKey(layer, e) for layer in range(cache.layers) for e in range(cache.slots(layer)))
        total = len(keys)
        while keys or self._loads:
            while keys and len(self._loads) < PRELOAD_WINDOW:
                key = keys.popleft()
                self.bring(key, cache.preload(*key), DEMAND)
            self.source.wait(0.1)
            check_interrupt()
            self.poll()
            if self._failures:
                raise self._failures.popitem()[1]
            if progress:
                progress(total - len(keys) - len(self._loads), total)

    def close(self) -> None:
        """Stop loads, then free the memory. Idempotent; leases that are still out lose their buffers."""
        self.source.close()
        self.source.finished.clear()
        for key, load in self._loads.items():
            self.cache.abandon(*key, load.moved)
        self._loads.clear()
        self.arena.close()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless loads and cache agree."""
        self.cache.check_integrity()
        self.source.check_integrity()
        loading = {
            ExpertKey(layer, expert)
            for layer in range(self.cache.layers)
            for expert in self.cache.loading(layer)
        }
        if loading != set(self._loads):
            raise RuntimeError(f"the cache waits for {sorted(loading)}, under way are {sorted(self._loads)}")

    def _settle(self, load: Load) -> None:
        key = load.key
        if self._loads.get(key) is not load:
            return  # claimed before its copy had ended
        wanted = self.cache.pins(*key) > 0
        slot = self.cache.slot_of(*key)
        if load.state is LoadState.DONE:
            del self._loads[key]
            self.cache.complete(*key)
        elif wanted and slot is not None and (load.state is LoadState.CANCELLED or load.joined):
            # Given up before it was needed again, or failed for a reason that may be gone by now.
            self.bring(key, slot, load.priority)
        else:
            del self._loads[key]
            self.cache.abandon(*key, load.moved)
            if load.error is not None and (wanted or load.priority == DEMAND):
                self._failures[key] = load.error


class CopyLoad(Load):
    """A load from the tier below, over the copy stream."""

    __slots__ = ("lower_held", "slot")

    def __init__(self, key: ExpertKey, nbytes: int, priority: int, slot: int) -> None:
        super().__init__(key, nbytes, priority)
        self.slot = slot
        self.lower_held = False
        """Whether the expert is pinned in the tier below."""


class CopySource:
    """Copies experts from a tier in host memory to a device, most urgent first.

    A load passes through: waiting (the tier below has no slot for it yet, or reads it from its own
    source), copying (issued on the copy stream, its event pending), finished. The expert stays pinned
    below until the copy has ended, so its bytes cannot be replaced under the copy engine; the copy waits
    for the slot's last reader, so no kernel loses its weights.
    """

    def __init__(self, lower: Tier, arena: Arena, device: Device, nbytes: Callable[[ExpertKey], int]) -> None:
        self.finished: deque[Load] = deque()
        self.bytes_copied = 0
        self._lower = lower
        self._arena = arena
        self._device = device
        self._nbytes = nbytes
        self._waiting: list[CopyLoad] = []
        self._copying: list[CopyLoad] = []
        self._readers: dict[tuple[int, int], Event] = {}

    def read_by(self, layer: int, slots: Sequence[int]) -> None:
        """All kernels that read these slots have been given to the device by now."""
        event = self._device.record()
        for slot in slots:
            self._readers[layer, slot] = event

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
                copying.event.synchronize()
        while self._copying:
            self.poll()
        self._readers.clear()

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
        if not load.lower_held:
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

    def _issue(self, load: CopyLoad) -> None:
        layer, expert = load.key
        lower_slot = self._lower.cache.slot_of(layer, expert)
        if lower_slot is None:
            raise RuntimeError(f"expert {load.key} is pinned below without a slot")
        source = self._lower.arena.buffer(layer, lower_slot)[: load.nbytes]
        destination = self._arena.buffer(layer, load.slot)[: load.nbytes]
        try:
            load.event = self._device.copy(destination, source, self._readers.get((layer, load.slot)))
        except RuntimeError as error:  # torch's errors of a device are RuntimeErrors
            self._release_lower(load)
            self._fail(
                load,
                TransferError(
                    f"expert {expert} of MoE layer {layer} could not be copied: {str(error).splitlines()[0]}"
                ),
            )
            return
        self._readers.pop((layer, load.slot), None)
        load.state = LoadState.RUNNING
        load.cause = "demand"  # from here on it is the link that is waited for, not the disk
        self._waiting.remove(load)
        self._copying.append(load)
        self.bytes_copied += load.nbytes

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
