"""Tracks which experts of a tier are in which slots: a state machine over (layer, expert), in plain ints."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import NamedTuple

from moe_local.cache.elsewhere import ServedElsewhere
from moe_local.cache.errors import OptionError
from moe_local.cache.policies import policy_for
from moe_local.cache.policy import EvictionPolicy
from moe_local.cache.sized_slots import SizedSlotPool
from moe_local.cache.slots import CacheStateError, SlotPool, add_pins
from moe_local.cache.staging import StagingRing
from moe_local.cache.stats import CacheCounters


class ShortageError(CacheStateError):
    """More experts are needed at once than slots can be made free; check `ExpertCache.shortage` first."""


class Acquisition(NamedTuple):
    """What `ExpertCache.acquire` granted. Every expert is pinned until it is released."""

    slots: list[int]
    """Slot of each expert, in the order in which they were asked for."""
    load: tuple[int, ...]
    """Newly admitted experts: the caller must load their bytes and then call `complete` or `abandon`."""
    joined: tuple[int, ...]
    """Experts that were loading already: the caller waits for those loads."""
    victims: tuple[int, ...] = ()
    """Experts evicted on account of the last ones of `load`; empty slots account for the others."""


class Promotion(NamedTuple):
    """What `ExpertCache.promote` did."""

    slot: int
    victim: int | None
    """The expert that was evicted for it; None: the slot was empty."""


class ExpertCache:
    """Residency of one tier's experts: absent -> loading -> resident -> absent.

    Each layer has its own slots (numbered from 0 within the layer) and its own eviction order, so that
    going through all layers for one token cannot flush what the next token needs. The cache neither holds
    nor moves bytes: the caller copies an expert into its slot and reports the end of the copy. A pinned
    (leased) or loading expert keeps its slot.

    Not thread-safe: one thread owns a cache and reports to it what other threads completed, so that no
    locks are needed and nobody can see an intermediate state.

    Misuse raises CacheStateError before anything has changed.
    """

    def __init__(
        self,
        slots: Sequence[int],
        policy: str | Callable[[], EvictionPolicy] = "lru",
        sizes: Callable[[int, int], int] = lambda layer, expert: 0,
        staging: int = 0,
        slot_sizes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`slots[layer]`: number of slots of each layer. `policy`: a name, or a factory that is called once
        for each layer, in ascending order. `staging`: number of slots that belong to no layer (StagingRing).

        `sizes(layer, expert)`: bytes of an expert, for counting what prefetches wasted (0 by default).
        `slot_sizes[layer]`: bytes of each of the layer's slots (more entries than slots are ignored), the
        largest enough for any expert; None: any expert fits in any slot. Raises OptionError for an unknown
        policy or a negative number of slots.
        """
        for layer, count in enumerate(slots):
            if count < 0:
                raise OptionError(f"layer {layer} has {count} slots; give 0 or more")
        make_policy = _maker(policy)
        # A dict, not a list: layer -1 must be an error, not the last layer.
        self._pools = {
            layer: _pool(slot_sizes[layer][:count], make_policy(), partial(sizes, layer))
            if slot_sizes is not None
            else SlotPool(count, make_policy())
            for layer, count in enumerate(slots)
        }
        self._policy = policy
        self._sizes = sizes
        self.stats = CacheCounters(len(slots))
        self.staging = StagingRing(staging, self._pools, self.stats, sizes, self._evict)
        self.elsewhere = ServedElsewhere(self._pools, self.staging, self._evict)

    # Queries

    @property
    def layers(self) -> int:
        return len(self._pools)

    def slots(self, layer: int) -> int:
        return len(self._pools[layer].expert_in)

    def free(self, layer: int) -> int:
        """Number of empty slots."""
        return len(self._pools[layer].free)

    def several_sizes(self, layer: int) -> bool:
        """Whether the layer's slots differ in size, so that some experts do not fit in some of them."""
        return isinstance(self._pools[layer], SizedSlotPool)

    def has_room(self, layer: int, expert: int) -> bool:
        """Whether there is an empty slot that an absent expert fits in."""
        return self._pools[layer].has_room(expert)

    def slot_of(self, layer: int, expert: int) -> int | None:
        """The slot of a loading or resident expert."""
        return self._pools[layer].table.get(expert)

    def expert_in(self, layer: int, slot: int) -> int | None:
        """The loading or resident expert in a slot."""
        return self._pools[layer].expert_in[slot]

    def is_resident(self, layer: int, expert: int) -> bool:
        pool = self._pools[layer]
        return expert in pool.table and expert not in pool.loading

    def has_all(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether all of these are resident, while no expert of the layer, not even another, is loading."""
        pool = self._pools[layer]
        return not pool.loading and all(expert in pool.table for expert in experts)

    def loading(self, layer: int) -> tuple[int, ...]:
        """Loading experts, in the order in which they were admitted."""
        return tuple(self._pools[layer].loading)

    def prefetching(self, layer: int) -> tuple[int, ...]:
        """Loading experts that only a prefetch has asked for so far: these loads may be cancelled."""
        pool = self._pools[layer]
        return tuple(expert for expert in pool.loading if expert in pool.unused)

    def residents(self, layer: int) -> tuple[int, ...]:
        """Resident experts in slots of the layer, without staged ones."""
        pool = self._pools[layer]
        return tuple(e for e in pool.table if e not in pool.loading and e not in pool.staged)

    def coldest(self, layer: int) -> list[int]:
        """The residents in slots of the layer, pinned or not, the policy's best victim first."""
        pool = self._pools[layer]
        return pool.coldest((), len(pool.table), pinned=True)

    def pins(self, layer: int, expert: int) -> int:
        """How many pins (leases) this expert has."""
        return self._pools[layer].pins.get(expert, 0)

    # Demand

    def shortage(self, layer: int, experts: Sequence[int]) -> int:
        """How many slots `acquire(layer, experts)` would lack now; 0 when it would succeed."""
        pool = self._pools[layer]
        return pool.lacking(experts, [expert for expert in experts if expert not in pool.table])

    def fits(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether these could all have slots if nothing else were pinned; present ones keep their slots."""
        return self._pools[layer].fits(experts)

    def at_once(self, layer: int, experts: Sequence[int]) -> list[int]:
        """The experts that would get slots if all of these were put into the empty layer, in this order."""
        return self._pools[layer].at_once(experts)

    def acquire(self, layer: int, experts: Sequence[int]) -> Acquisition:
        """Pin the experts that one step needs of a layer; admit those that are absent.

        `experts` are distinct, in the router's order. All are looked up together; then the present ones are
        touched and the absent ones admitted, both in that order. No expert of this call and no pinned or
        loading one is evicted for that. A resident expert counts as a hit (and as `prefetch.used` if it was
        prefetched and this is its first need), any other as a miss (and as `prefetch.late` if a prefetch is
        still loading it).

        Raises ShortageError or CacheStateError, having changed nothing.
        """
        pool = self._pools[layer]
        distinct = set(experts)
        if len(distinct) != len(experts):
            raise CacheStateError(f"layer {layer}: experts {list(experts)} are not distinct")
        table = pool.table
        try:
            slots = [table[expert] for expert in experts]
        except KeyError:
            return self._acquire_any(layer, pool, experts, distinct)
        if (
            (pool.loading and not pool.loading.keys().isdisjoint(experts))
            or (pool.unused and not pool.unused.isdisjoint(experts))
            or pool.staged
        ):
            return self._acquire_any(layer, pool, experts, distinct)
        pool.policy.touch(experts)
        add_pins(pool, experts)
        self.stats.hits_by_layer[layer] += len(slots)
        return Acquisition(slots, (), ())

    def _acquire_any(
        self, layer: int, pool: SlotPool, experts: Sequence[int], distinct: set[int]
    ) -> Acquisition:
        """The general case of `acquire`: experts may be absent, loading, staged, or prefetched and unused."""
        table, stats = pool.table, self.stats
        absent = tuple([expert for expert in experts if expert not in table])
        lacking = pool.lacking(distinct, absent)
        if lacking:
            raise ShortageError(
                f"layer {layer} needs experts {list(experts)} at once and lacks {lacking} slots: of "
                f"{len(pool.expert_in)}, {len(pool.pins)} are pinned and {len(pool.loading)} loading"
            )
        present = [expert for expert in experts if expert in table]
        joined = tuple([expert for expert in present if expert in pool.loading])
        self.staging.count_use(layer, pool, present, joined)
        pool.policy.touch([expert for expert in experts if expert not in pool.staged], absent)
        victims = pool.victims(distinct, absent) if absent else []
        for victim in victims:
            self._evict(layer, pool, victim)
        for expert in absent:
            pool.place(expert)
        add_pins(pool, experts)
        misses = len(absent) + len(joined)
        stats.misses_by_layer[layer] += misses
        stats.hits_by_layer[layer] += len(experts) - misses
        return Acquisition([table[expert] for expert in experts], absent, joined, tuple(victims))

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """Remove one pin of each of these distinct experts. Loading ones go on loading.

        A staged expert left without a pin becomes absent, as soon as it is no longer loading.
        """
        pool = self._pools[layer]
        pins = pool.pins
        distinct = set(experts)
        if len(distinct) != len(experts) or not pins.keys() >= distinct:
            raise CacheStateError(f"layer {layer}: released {list(experts)} where pins are {pins}")
        for expert in experts:
            left = pins[expert] - 1
            if left:
                pins[expert] = left
            else:
                del pins[expert]
        if pool.staged:
            for expert in pool.staged.intersection(experts):
                if expert not in pins:
                    self.staging.give_up(layer, pool, expert)

    def pass_over(self, layer: int, experts: Sequence[int]) -> None:
        """Count a step's needs of non-resident experts that are computed elsewhere, for instance by the CPU.

        Each is a miss (and `prefetch.late` if a prefetch is loading it, which goes on). Nothing is admitted
        or pinned. Raises CacheStateError for a resident expert.
        """
        pool = self._pools[layer]
        for expert in experts:
            if self.is_resident(layer, expert):
                raise CacheStateError(f"layer {layer}: expert {expert} is resident and was passed over")
        late = pool.unused.intersection(experts)
        pool.unused -= late
        pool.policy.pass_over(experts)
        self.stats.prefetch_late += len(late)
        self.stats.misses_by_layer[layer] += len(experts)
        for expert in pool.staged.intersection(experts):
            self.staging.give_up(layer, pool, expert)

    # Ahead of demand

    def reserve(self, layer: int, expert: int, keep: Container[int] = ()) -> int | None:
        """Admit an absent expert to be prefetched. Returns its slot; None if it is present or has no room.

        Takes an empty slot, or that of the policy's best victim that is resident, unpinned and not in `keep`.
        """
        made = self.promote(layer, expert, keep)
        if made is None:
            return None
        self._pools[layer].unused.add(expert)
        self.stats.prefetch_issued += 1
        return made.slot

    def promote(self, layer: int, expert: int, keep: Container[int] = ()) -> Promotion | None:
        """`reserve` for an expert that was needed before: counts no prefetch, and names the victim, too."""
        pool = self._pools[layer]
        if expert in pool.table:
            return None
        victim = None
        if not pool.has_room(expert):
            victims = pool.victims(keep, [expert])
            if not victims:
                return None
            victim = victims[0]
            self._evict(layer, pool, victim)
        return Promotion(pool.place(expert), victim)

    def preload(self, layer: int, expert: int) -> int:
        """Admit an absent expert to an empty slot, which it returns; for loading a model, counted nowhere."""
        pool = self._pools[layer]
        if expert in pool.table:
            raise CacheStateError(
                f"layer {layer}: expert {expert} to preload is already in slot {pool.table[expert]}"
            )
        if not pool.has_room(expert):
            raise ShortageError(
                f"layer {layer}: no free slot of {len(pool.expert_in)} to preload expert {expert}"
            )
        return pool.place(expert)

    # Fewer slots

    def in_slots(self, layer: int, first: int) -> tuple[int, ...]:
        """The loading and resident experts in the slots from `first` on."""
        return tuple(e for e in self._pools[layer].expert_in[first:] if e is not None)

    def keep_slots(self, layer: int, slots: int) -> int:
        """Remove all but the first `slots` slots of a layer; returns how many experts were evicted for that.

        Counted as evictions. Raises CacheStateError, having changed nothing, if one of the experts there is
        pinned or loading.
        """
        pool = self._pools[layer]
        leaving = self.in_slots(layer, slots)
        for expert in leaving:
            if expert in pool.pins or expert in pool.loading:
                raise CacheStateError(
                    f"layer {layer}: slot {pool.table[expert]} is to go while its expert {expert} is "
                    f"{'pinned' if expert in pool.pins else 'loading'}"
                )
        for expert in leaving:
            self._evict(layer, pool, expert)
        pool.keep(slots)
        return len(leaving)

    # The end of a copy

    def complete(self, layer: int, expert: int) -> None:
        """The expert's bytes are in its slot: loading -> resident."""
        pool = self._pools[layer]
        if expert not in pool.loading:
            raise CacheStateError(f"layer {layer}: expert {expert} is not loading; {list(pool.loading)} are")
        del pool.loading[expert]
        if expert in pool.staged:
            self.staging.completed(layer, pool, expert)

    def abandon(self, layer: int, expert: int, bytes_moved: int = 0) -> None:
        """The copy was cancelled or failed: loading -> absent; its slot is free, and its pins are removed.

        Nothing may write to the slot any more. `bytes_moved` count as wasted if only a prefetch had asked
        for the expert; a miss that was counted remains counted.
        """
        pool = self._pools[layer]
        if expert not in pool.loading:
            raise CacheStateError(f"layer {layer}: expert {expert} is not loading; {list(pool.loading)} are")
        if expert in pool.unused:
            self.stats.prefetch_wasted_bytes += bytes_moved
        self.staging.remove(layer, pool, expert)

    # Starting over

    def empty(self, policy: str | Callable[[], EvictionPolicy] | None = None) -> None:
        """Make every expert absent, with new policies that remember nothing: the state of a new cache.

        `policy`: the one to use from now on; None: as before. Counted nowhere. Raises CacheStateError, having
        changed nothing, while an expert is pinned or loading, and OptionError for an unknown policy.
        """
        make_policy = _maker(policy or self._policy)
        for layer, pool in self._pools.items():
            if pool.pins or pool.loading:
                raise CacheStateError(
                    f"layer {layer} cannot be emptied: pinned are {list(pool.pins)}, "
                    f"loading {list(pool.loading)}"
                )
        self._policy = policy or self._policy
        self.staging.clear(-1, ())
        for layer, pool in self._pools.items():
            self._pools[layer] = pool.fresh(make_policy())

    def _evict(self, layer: int, pool: SlotPool, expert: int) -> None:
        self.stats.evictions += 1
        if expert in pool.unused:
            self.stats.prefetch_wasted_bytes += self._sizes(layer, expert)
        pool.remove(expert)

    def check_integrity(self) -> None:
        """Raise CacheStateError with the facts if any table disagrees with another."""
        self.staging.check_integrity()
        for layer, pool in self._pools.items():
            try:
                pool.check_integrity()
            except CacheStateError as error:
                raise CacheStateError(f"layer {layer}: {error}") from None
            if self.stats.hits_by_layer[layer] < 0 or self.stats.misses_by_layer[layer] < 0:
                raise CacheStateError(f"layer {layer}: a counter is negative")


def _pool(sizes: Sequence[int], policy: EvictionPolicy, need: Callable[[int], int]) -> SlotPool:
    """The slots of a layer, of one or of several sizes."""
    return SizedSlotPool(sizes, policy, need) if len(set(sizes)) > 1 else SlotPool(len(sizes), policy)


def _maker(policy: str | Callable[[], EvictionPolicy]) -> Callable[[], EvictionPolicy]:
    """A factory of the policies of one cache's layers; new for each cache, since these may share state."""
    return policy_for(policy) if isinstance(policy, str) else policy
