"""Steps that a device has served from a cache's slots by itself, told to the cache afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moe_local.cache.slots import CacheStateError, SlotPool
from moe_local.cache.staging import StagingRing


class ServedElsewhere:
    """A part of an ExpertCache, for a device that looks experts up and brings them by itself.

    It is told which slots to fill next, in the policy's order, and tells which it has filled, and for whom.
    Meanwhile nothing may be loading, staged or pinned. Hits and misses are counted by whoever served the
    step.
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
        """The slots that absent experts would be put into now, the first one first; at most `count`.

        Empty ones, then those of the policy's best victims. For slots that are alike: where they have several
        sizes (`ExpertCache.several_sizes`) it depends on the expert.
        """
        pool = self._pools[layer]
        free = pool.free[: -count - 1 : -1]
        return free + [pool.table[expert] for expert in pool.coldest((), count - len(free))]

    def follow(self, layer: int, experts: Sequence[int], filled: Sequence[int]) -> None:
        """A step needed these distinct experts, in the router's order.

        `filled[i]` is the slot that the absent expert `experts[i]` was brought into, whoever was in it, and
        -1 for one that was resident. Counts evictions, and the first needs of experts that were prefetched.
        Raises CacheStateError, having changed nothing, for what cannot have been.
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
