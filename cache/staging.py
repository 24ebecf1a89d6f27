"""Slots that belong to no layer, for experts that a long step needs only once."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

from moe_local.cache.keys import ExpertKey
from moe_local.cache.slots import CacheStateError, SlotPool, add_pins
from moe_local.cache.stats import CacheCounters


class Held(NamedTuple):
    """What `StagingRing.hold` found. The ready and joined experts are pinned until they are released."""

    ready: list[int]
    """Resident experts."""
    joined: list[int]
    """Experts that are loading already."""
    absent: list[int]


class StagingRing:
    """A few slots that all layers of an ExpertCache share, numbered -1, -2 and so on; a part of that cache.

    A step of many tokens needs most experts of a layer, each of them once. If they were admitted, they would
    evict the residents and each other; instead they are *staged* in the ring for a short time. A staged
    expert is loading or resident like any other but has no place in an eviction order. It becomes absent with
    its last pin. One that was read ahead of its need has no pin yet and stays until it is needed or given up.
    """

    def __init__(
        self,
        slots: int,
        pools: Mapping[int, SlotPool],
        stats: CacheCounters,
        sizes: Callable[[int, int], int],
        evict: Callable[[int, SlotPool, int], None],
    ) -> None:
        self.slots = slots
        self._pools = pools
        self._stats = stats
        self._sizes = sizes
        self._evict = evict
        self._free = [~slot for slot in reversed(range(slots))]
        self._keys: dict[ExpertKey, None] = {}
        """The staged experts, the longest staged first."""
        self._doomed: set[ExpertKey] = set()
        """Staged, loading experts that nobody needs any more: they become absent when their loads end."""

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return len(self._keys)

    # Called for a step

    def hold(self, layer: int, experts: Sequence[int]) -> Held:
        """Pin the present ones of these distinct experts, and count hits and misses as `acquire` does.

        Nothing is admitted or touched. The caller must stage the absent ones, or promote and pin them.
        """
        pool = self._pools[layer]
        held = Held([], [], [])
        for expert in experts:
            if expert not in pool.table:
                held.absent.append(expert)
            else:
                (held.joined if expert in pool.loading else held.ready).append(expert)
        present = [*held.ready, *held.joined]
        self.count_use(layer, pool, present, held.joined)
        add_pins(pool, present)
        self._stats.misses_by_layer[layer] += len(held.joined) + len(held.absent)
        self._stats.hits_by_layer[layer] += len(held.ready)
        return held

    def stage(self, layer: int, expert: int, *, ahead: bool = False) -> int | None:
        """Put an absent expert, as loading, into a free slot of its layer, or else of the ring.

        Returns the slot; None if there is neither. The expert is pinned, unless it is read `ahead` of its
        need, which counts as a prefetch.
        """
        pool = self._pools[layer]
        if expert in pool.table:
            raise CacheStateError(f"layer {layer}: expert {expert} to stage is in slot {pool.table[expert]}")
        if pool.has_room(expert):
            slot = pool.place(expert)
        elif self._free:
            slot = self._free.pop()
            self._keys[ExpertKey(layer, expert)] = None
            pool.stage(expert, slot)
        else:
            return None
        if ahead:
            pool.unused.add(expert)
            self._stats.prefetch_issued += 1
        else:
            add_pins(pool, [expert])
        return slot

    def pin(self, layer: int, expert: int) -> None:
        """Add one pin to a present expert; counted nowhere."""
        pool = self._pools[layer]
        if expert not in pool.table:
            raise CacheStateError(f"layer {layer}: expert {expert} to pin is absent")
        add_pins(pool, [expert])
        self._doomed.discard(ExpertKey(layer, expert))

    def has(self, layer: int, expert: int) -> bool:
        """Whether the expert is staged."""
        return expert in self._pools[layer].staged

    def admit(self, layer: int, expert: int, keep: Container[int]) -> int | None:
        """Move a staged, resident expert to a slot of its layer: an empty one, or that of the policy's best
        victim that is unpinned and not in `keep`. Returns the slot; None if there is neither.

        The expert keeps its pins; its slot of the ring becomes free. The caller must copy the bytes.
        """
        pool = self._pools[layer]
        if expert not in pool.staged or expert in pool.loading:
            raise CacheStateError(f"layer {layer}: expert {expert} to admit is not staged and resident")
        if not pool.has_room(expert):
            victims = pool.victims(keep, [expert])
            if not victims:
                return None
            self._evict(layer, pool, victims[0])
        ring_slot = pool.table[expert]
        slot = pool.admit(expert)
        self._forget(layer, expert, ring_slot)
        return slot

    def evict(self, layer: int, expert: int) -> None:
        """Evict a resident, unpinned expert whose bytes could not be copied to its slot."""
        self._evict(layer, self._pools[layer], expert)

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Tell the policy that these were needed, the last most recently, except absent and staged ones."""
        pool = self._pools[layer]
        pool.policy.touch([e for e in experts if e in pool.table and e not in pool.staged])

    def next_victims(self, layer: int, keep: Container[int], experts: Sequence[int]) -> list[int]:
        """The residents, pinned or not, that would be evicted next to admit these experts."""
        return self._pools[layer].victims(keep, experts, pinned=True)

    def clear(self, layer: int, keep: Container[int]) -> list[ExpertKey]:
        """Give up all staged experts without a pin, except those of `layer` that are in `keep`.

        Returns those still loading: the caller may cancel their loads, with whose end they become absent.
        """
        loading = []
        for key in tuple(self._keys):
            pool = self._pools[key.layer]
            if key.expert in pool.pins or (key.layer == layer and key.expert in keep):
                continue
            if key.expert in pool.loading:
                loading.append(key)
            self.give_up(key.layer, pool, key.expert)
        return loading

    # Called by the cache

    def count_use(self, layer: int, pool: SlotPool, present: Sequence[int], joined: Sequence[int]) -> None:
        """Count the first needs of prefetched experts; `joined` are those of `present` still loading."""
        first_needs = pool.unused.intersection(present)
        if first_needs:
            late = len(first_needs.intersection(joined))
            self._stats.prefetch_late += late
            self._stats.prefetch_used += len(first_needs) - late
            pool.unused -= first_needs
        for expert in pool.staged.intersection(present):
            self._doomed.discard(ExpertKey(layer, expert))

    def give_up(self, layer: int, pool: SlotPool, expert: int) -> None:
        """Make a staged expert that nobody needs absent, now or when its load ends."""
        if expert in pool.loading:
            self._doomed.add(ExpertKey(layer, expert))
            return
        if expert in pool.unused:
            self._stats.prefetch_wasted_bytes += self._sizes(layer, expert)
        self.remove(layer, pool, expert)

    def completed(self, layer: int, pool: SlotPool, expert: int) -> None:
        """A staged expert has been loaded; it becomes absent if it was given up meanwhile."""
        if ExpertKey(layer, expert) in self._doomed:
            self.give_up(layer, pool, expert)

    def remove(self, layer: int, pool: SlotPool, expert: int) -> None:
        """Make a present expert absent, staged or not."""
        slot = pool.remove(expert)
        if slot < 0:
            self._forget(layer, expert, slot)

    def _forget(self, layer: int, expert: int, slot: int) -> None:
        key = ExpertKey(layer, expert)
        del self._keys[key]
        self._doomed.discard(key)
        self._free.append(slot)

    def check_integrity(self) -> None:
        """Raise CacheStateError unless every slot is free or has the one expert that the pools name."""
        staged = {
            ExpertKey(layer, expert): pool.table[expert]
            for layer, pool in self._pools.items()
            for expert in pool.staged
        }
        if staged.keys() != self._keys.keys():
            raise CacheStateError(f"staged are {staged}, the ring has {list(self._keys)}")
        if sorted([*self._free, *staged.values()]) != [~slot for slot in reversed(range(self.slots))]:
            raise CacheStateError(f"of {self.slots} staging slots {self._free} are free, {staged} in use")
        for key in staged:
            pool = self._pools[key.layer]
            if key in self._doomed:
                right = key.expert in pool.loading and key.expert not in pool.pins
            else:
                right = key.expert in pool.pins or key.expert in pool.unused
            if not right:
                raise CacheStateError(f"{key} is staged for nobody, or given up while somebody needs it")
        if not self._doomed <= staged.keys():
            raise CacheStateError(f"{self._doomed} are to leave, but staged are {staged}")
