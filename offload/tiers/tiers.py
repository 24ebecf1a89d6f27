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
from moe_local.offload.system.interrupt import LOOK_SECONDS
from moe_local.offload.system.interrupt import check as check_interrupt
from moe_local.offload.tiers.device import Device, Waited
from moe_local.offload.tiers.device_arena import DeviceArena, per_layer
from moe_local.offload.tiers.staging import Slots, StagedArena
from moe_local.offload.tiers.transfer import DEMAND, Load, LoadState, Source

PRELOAD_WINDOW = 16
"""Loads in flight while a tier is filled: enough to keep the reader threads busy."""


class Tier:
    """A cache of experts over an arena of slots, filled from a source.

    Owned and called by one thread, the engine's. What a source does in other threads reaches the cache
    only through `poll`, so neither needs a lock. Every expert that the cache calls loading has exactly
    one load here, and the other way round (`check_integrity`).
    """

    def __init__(
        self,
        cache: ExpertCache,
        arena: Slots,
        source: Source,
        device: Device | Sequence[Device] | None = None,
    ) -> None:
        """`device`: whose kernels read the arena asynchronously, one for all layers or one per layer; None:
        the CPU computes."""
        self.cache = cache
        self.arena = arena
        self.source = source
        self._devices = None if device is None else per_layer(device, cache.layers)
        self._loads: dict[ExpertKey, Load] = {}
        self._failures: dict[ExpertKey, TransferError] = {}
        self.emptied = 0
        """How often `empty` was called; code that remembers where experts are compares it."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the arena, each once."""
        return tuple(dict.fromkeys(self._devices or ()))

    def device_of(self, layer: int) -> Device | None:
        """The device whose kernels read the layer's slots asynchronously; None: the CPU computes."""
        return None if self._devices is None else self._devices[layer]

    def poll(self) -> None:
        """Update the cache from loads that have ended. Does not block."""
        self.source.poll()
        finished = self.source.finished
        while finished:
            self._settle(finished.popleft())

    def bring(self, key: ExpertKey, slot: int, priority: int) -> None:
        """Start the load of an expert that the cache has just put into `slot`."""
        self._failures.pop(key, None)
        self._loads[key] = self.source.start(key, slot, priority)

    def promote(self, key: ExpertKey, priority: int = DEMAND) -> None:
        """Raise the priority of a load in flight; DEMAND: it is needed now."""
        load = self._loads[key]
        load.joined = True
        self.source.promote(load, priority)

    def cancel(self, key: ExpertKey) -> None:
        """Cancel a load in flight, if possible; its slot is free once the load has ended."""
        self.source.cancel(self._loads[key])

    def give_up(self, key: ExpertKey) -> None:
        """Remove one pin of an expert; if it was the last and the expert is still loading, cancel that."""
        if self._failures.pop(key, None) is not None:
            return  # its load failed, which removed its pins
        self.cache.release(key.layer, [key.expert])
        if key in self._loads and not self.cache.pins(*key):
            self.cancel(key)

    def cause(self, key: ExpertKey) -> str:
        """The cause that a wait for this expert's load is charged to: a field of StallSeconds."""
        return self._loads[key].cause

    def copying(self, key: ExpertKey) -> bool:
        """Whether the copy of a loading expert was issued, so that it completes without the host."""
        return self._loads[key].event is not None

    @property
    def loading(self) -> bool:
        """Whether any load is in flight."""
        return bool(self._loads)

    @property
    def bytes_in_flight(self) -> int:
        """Bytes that the loads in flight have still to transfer."""
        return sum(load.nbytes - load.moved for load in self._loads.values())

    def claim(self, key: ExpertKey) -> tuple[bool, Waited | None]:
        """Whether kernels that read the expert may be launched now, and the device's wait for its copy.

        True if it is resident, or if its copy was issued: then the compute stream is made to wait for the
        copy, and the host goes on. Raises the load's error if it failed.
        """
        if error := self._failures.pop(key, None):
            raise error
        if self.cache.is_resident(*key):
            return True, None
        event, device = self._loads[key].event, self.device_of(key.layer)
        if event is None or device is None:
            return False, None
        waited = device.wait(event)
        del self._loads[key]
        self.cache.complete(*key)
        return True, waited

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Load every expert into a slot of its own; `progress` is called with (experts loaded, all experts).

        For a tier with as many slots as experts. Blocks. Raises the first load's error.
        """
        cache = self.cache
        keys = deque(ExpertKey(layer, e) for layer in range(cache.layers) for e in range(cache.slots(layer)))
        total = len(keys)
        while keys or self._loads:
            while keys and len(self._loads) < PRELOAD_WINDOW:
                key = keys.popleft()
                self.bring(key, cache.preload(*key), DEMAND)
            self.source.wait(LOOK_SECONDS)
            check_interrupt()
            self.poll()
            if self._failures:
                raise self._failures.popitem()[1]
            if progress:
                progress(total - len(keys) - len(self._loads), total)

    def empty(self, policy: str | None = None) -> None:
        """Cancel all loads and evict every expert. `policy`: the eviction policy from now on.

        Blocks until no load writes to a slot any more. Nothing may be leased.
        """
        for key in list(self._loads):
            self.cancel(key)
        while self._loads or self.source.busy:  # the expert of a claimed copy is still pinned below
            self.source.wait(LOOK_SECONDS)
            check_interrupt()
            self.poll()
        self._failures.clear()
        self.cache.empty(policy)
        self.emptied += 1

    def close(self) -> None:
        """Stop loads, then free the memory. Idempotent. Leases that are still held lose their buffers."""
        try:
            self.source.close()
        finally:
            self.source.finished.clear()
            for key, load in self._loads.items():
                self.cache.abandon(*key, load.moved)
            self._loads.clear()
            self.arena.close()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless loads and cache agree."""
        self.cache.check_integrity()
        self.source.check_integrity()
        arena = self.arena.own if isinstance(self.arena, StagedArena) else self.arena
        if isinstance(arena, DeviceArena):
            arena.check_integrity()
            slots = tuple(self.cache.slots(layer) for layer in range(self.cache.layers))
            if arena.slots not in (slots, (0,) * len(slots)):  # all 0 once it is closed
                raise RuntimeError(f"the cache has {slots} slots, the arena {arena.slots}")
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
            # It was cancelled before it was needed again, or failed for a reason that may be gone by now.
            self.bring(key, slot, load.priority)
        else:
            del self._loads[key]
            self.cache.abandon(*key, load.moved)
            if load.error is not None and (wanted or load.priority == DEMAND):
                self._failures[key] = load.error
