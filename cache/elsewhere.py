"""Updates a cache afterwards with the steps that a device served from the cache's slots by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moe_local.cache.slots import CacheStateError, SlotPool
from moe_local.cache.staging import StagingRing


class ServedElsewhere:
    """The part of an ExpertCache for a device that looks experts up and loads absent ones by itself.

    The device gets the slots to fill next, in the policy's order, and tells which slots it filled with which
    expert. Meanwhile nothing may be loading, staged or pinned. The code that served the step counts its hits
    and misses.
    """

    def __init__(
        self,
        pools: Mapping[int, SlotPool],
        staging: StagingRing,
        evict: Callable[[int, SlotPool, int], None],
    ) -> None:
        self._pools = pools
        self._staging = staging
        self._evict = evict

    def next_filled(self, layer: int, count: int) -> list[int]:
        """At most `count` slots that absent experts would be put into now, in the order of their use.

        Empty slots come first, then those of the policy's best victims. All slots must have one size: with
        several sizes (`ExpertCache.several_sizes`) the choice of a slot depends on the expert.
        """
        pool = self._pools[layer]
        free = pool.free[: -count - 1 : -1]
        return free + [pool.table[expert] for expert in pool.coldest((), count - len(free))]

    def follow(self, layer: int, experts: Sequence[int], filled: Sequence[int]) -> None:
        """Record that a step needed these distinct experts, given in the router's order.

        `filled[i]` is the slot that the absent expert `experts[i]` was loaded into, evicting any occupant,
        or -1 if `experts[i]` was resident. Counts evictions, and the first uses of prefetched experts.
        Raises CacheStateError, and changes nothing, if the report contradicts the cache's state.
        """
        pool, table = self._pools[layer], self._pools[layer].table
        absent = [expert for expert, slot in zip(experts, filled, strict=True) if slot >= 0]
        present = [expert for expert in experts if expert not in absent] if absent else experts
        taken = [slot for slot in filled if slot >= 0]
        leaving = [expert for slot in taken if (expert := pool.expert_in[slot]) is not None]
        if (
            pool.loading
            or any(expert not in table for expert in present)
            or any(expert in table for expert in absent)
            or len(set(taken)) != len(taken)
            or any(expert in pool.pins or expert in present for expert in leaving)
        ):
            raise CacheStateError(
                f"layer {layer}: experts {list(experts)} cannot have been brought to slots {list(filled)} of "
                f"{pool.expert_in}, with {list(pool.loading)} loading and {list(pool.pins)} pinned"
            )
        if pool.unused:
            self._staging.count_use(layer, pool, present, ())
        pool.policy.touch(experts, absent)
        for expert in leaving:
            self._evict(layer, pool, expert)
        for expert, slot in zip(absent, taken, strict=True):
            pool.put(expert, slot)
