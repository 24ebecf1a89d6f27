"""Slots that belong to no layer: what a long step needs once passes through them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

from moe_local.cache.keys import ExpertKey
from moe_local.cache.slots import CacheStateError, SlotPool, add_pins
from moe_local.cache.stats import CacheCounters


class Held(NamedTuple):
    """What `StagingRing.hold` found. The first two are pinned until they are released."""

    ready: list[int]
    """Resident ones."""
    joined: list[int]
    """Those that somebody is bringing."""
    absent: list[int]


class StagingRing:
    """A few slots that all layers of an ExpertCache share, numbered -1, -2 and so on; a part of that cache.

    A step of many tokens needs most experts of a layer, each of them once. Were they admitted, they would
    flush what is resident, and each other; staged instead, they pass through. A staged expert is loading or
    resident like any other but has no place in an eviction order. It leaves by itself with its last pin.
    One that was read ahead of its need has no pin yet and stays until it is needed or given up.
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
        """What is staged, the longest there first."""
        self._doomed: set[ExpertKey] = set()
        """Loading ones that nobody needs any more: they leave when their loads have come to an end."""

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return len(self._keys)

    # What a step does

    def hold(self, layer: int, experts: Sequence[int]) -> Held:
        """Pin those of these distinct experts that are present, and count all of them as `acquire` does.

        Admits and touches nothing. The caller has the absent ones staged, or promoted and pinned.
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
        """A slot for an absent expert, which then is loading: a free one of the layer, else one of the ring.

        None if there is neither. Pinned, unless it is read `ahead` of its need, which counts as a prefetch.
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
        """One more pin of a present expert, counted nowhere."""
        pool = self._pools[layer]
        if expert not in pool.table:
            raise CacheStateError(f"layer {layer}: expert {expert} to pin is absent")
        add_pins(pool, [expert])
        self._doomed.discard(ExpertKey(layer, expert))

    def has(self, layer: int, expert: int) -> bool:
        """Whether the expert is staged."""
        return expert in self._pools[layer].staged

    def house(self, layer: int, expert: int, keep: Container[int]) -> int | None:
        """Give a staged, resident expert a slot of its layer: an empty one, or that of the policy's best
        victim that is unpinned and not in `keep`; None if there is neither. The caller copies its bytes.

        Its pins stay, and its slot of the ring is free.
        """
        pool = self._pools[layer]
        if expert not in pool.staged or expert in pool.loading:
            raise CacheStateError(f"layer {layer}: expert {expert} to be housed is not staged and resident")
        if not pool.has_room(expert):
            victims = pool.victims(keep, [expert])
            if not victims:
                return None
            self._evict(layer, pool, victims[0])
        ring_slot = pool.table[expert]
        slot = pool.house(expert)
        self._forget(layer, expert, ring_slot)
        return slot

    def evict(self, layer: int, expert: int) -> None:
        """Make a resident, unpinned expert absent, wherever it is: its bytes could not be copied."""
        self._evict(layer, self._pools[layer], expert)

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Tell the policy that these were needed, the last one most recently; staged ones are left out."""
        pool = self._pools[layer]
        pool.policy.touch([e for e in experts if e in pool.table and e not in pool.staged])

    def next_victims(self, layer: int, keep: Container[int], homeless: Sequence[int]) -> list[int]:
        """The residents that would be evicted next to make room for these others, pinned or not."""
        return self._pools[layer].victims(keep, homeless, pinned=True)

    def clear(self, layer: int, keep: Container[int]) -> list[ExpertKey]:
        """Give up what is staged without a pin, except `keep` of this layer.

        Returns those still loading, whose loads may be cancelled: they leave when these have ended.
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

    # What the cache tells

    def count_use(self, layer: int, pool: SlotPool, present: Sequence[int], joined: Sequence[int]) -> None:
        """Count the first needs of what was prefetched; `joined` are those of `present` still loading."""
        first_needs = pool.unused.intersection(present)
        if first_needs:
            late = len(first_needs.intersection(joined))
            self._stats.prefetch_late += late
            self._stats.prefetch_used += len(first_needs) - late
            pool.unused -= first_needs
        for expert in pool.staged.intersection(present):
            self._doomed.discard(ExpertKey(layer, expert))

    def give_up(self, layer: int, pool: SlotPool, expert: int) -> None:
        """Nobody needs a staged expert (any more)."""
        if expert in pool.loading:
            self._doomed.add(ExpertKey(layer, expert))
            return
        if expert in pool.unused:
            self._stats.prefetch_wasted_bytes += self._sizes(layer, expert)
        self.remove(layer, pool, expert)

    def completed(self, layer: int, pool: SlotPool, expert: int) -> None:
        """A staged expert's bytes have come."""
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
        """Raise CacheStateError unless every slot is free or has the one expert that the pools say."""
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
