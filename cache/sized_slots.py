"""One layer's slots where experts, and therefore slots, have several sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from moe_local.cache.policy import EvictionPolicy
from moe_local.cache.slots import SlotPool


class SizedSlotPool(SlotPool):
    """A SlotPool whose slots have sizes: an expert fits in any slot that is at least as large as itself.

    An expert gets the smallest empty slot that it fits in. If there is none, the policy's best victim among
    the slots of the smallest sufficient size is evicted; only if none of those can be, the best one in a
    larger slot. So a small expert seldom takes a large slot: on recorded routes the hit rate in bytes is up
    to 5 points higher than with the best victim of all slots, and 0 to 2 points lower than in a cache that
    packs experts without any gap (docs/log.md).

    Which experts can be present together depends on the slots that pinned experts lie in. Any one expert
    alone always finds a slot once nothing is pinned, if the largest slot holds the largest expert.
    """

    __slots__ = ("_distinct", "_need", "_sizes")

    def __init__(self, sizes: Sequence[int], policy: EvictionPolicy, need: Callable[[int], int]) -> None:
        """`sizes`: bytes of each slot; `need(expert)`: bytes of an expert."""
        super().__init__(len(sizes), policy)
        self._sizes = list(sizes)
        self._distinct = sorted(set(sizes))
        self._need = need

    def fresh(self, policy: EvictionPolicy) -> SizedSlotPool:
        return SizedSlotPool(self._sizes, policy, self._need)

    def take(self, expert: int) -> int:
        sizes, need = self._sizes, self._need(expert)
        slot = min((slot for slot in self.free if sizes[slot] >= need), key=lambda slot: (sizes[slot], slot))
        self.free.remove(slot)
        return slot

    def keep(self, slots: int) -> None:
        super().keep(slots)
        del self._sizes[slots:]
        self._distinct = sorted(set(self._sizes))

    def has_room(self, expert: int) -> bool:
        need = self._need(expert)
        return any(self._sizes[slot] >= need for slot in self.free)

    def fits(self, experts: Sequence[int]) -> bool:
        absent = [e for e in experts if e not in self.table or e in self.staged]
        if not absent:
            return True
        taken = {self.table[e] for e in experts if e in self.table and e not in self.staged}
        there = [size for slot, size in enumerate(self._sizes) if slot not in taken]
        return not _deficiency(there, map(self._need, absent))

    def at_once(self, experts: Sequence[int]) -> list[int]:
        left, chosen = sorted(self._sizes), []
        for expert in experts:
            best = bisect_left(left, self._need(expert))
            if best < len(left):
                del left[best]
                chosen.append(expert)
        return chosen

    def lacking(self, experts: Container[int], absent: Sequence[int]) -> int:
        if not absent:
            return 0
        usable = [*self.free, *(self.table[e] for e in self._evictable(self.table, experts))]
        return _deficiency([self._sizes[slot] for slot in usable], map(self._need, absent))

    def victims(self, keep: Container[int], absent: Sequence[int], *, pinned: bool = False) -> list[int]:
        candidates = list(self._coldest_but(keep) if pinned else self._evictable(self.policy.coldest(), keep))
        left = sorted(self._sizes[slot] for slot in self.free)
        victims = []
        for need in sorted(map(self._need, absent), reverse=True):  # the largest fit in the fewest slots
            best = bisect_left(left, need)
            if best < len(left):
                del left[best]
                continue
            victim = self._victim(candidates, need)
            if victim is not None:
                candidates.remove(victim)
                victims.append(victim)
        return victims

    def _victim(self, candidates: Sequence[int], need: int) -> int | None:
        """The candidate whose slot an expert of `need` bytes takes; None if it fits in none of theirs."""
        own = bisect_left(self._distinct, need)
        if own == len(self._distinct):
            return None
        best, sizes, table = None, self._sizes, self.table
        for expert in candidates:
            size = sizes[table[expert]]
            if size == self._distinct[own]:
                return expert
            if best is None and size >= need:
                best = expert
        return best

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        if len(self._sizes) != len(self.expert_in):
            yield f"{len(self._sizes)} slots have a size, there are {len(self.expert_in)}"
        for slot, expert in enumerate(self.expert_in):
            if expert is not None and self._sizes[slot] < self._need(expert):
                yield f"expert {expert} is in slot {slot} of {self._sizes[slot]} bytes, which is too small"


def _deficiency(slots: Sequence[int], experts: Iterable[int]) -> int:
    """The least number of experts that are left without a slot; slots and experts are given by their bytes.

    A slot that fits an expert fits all smaller ones, so it is enough to compare, from the largest expert on,
    the number of experts with the number of slots that these fit in (Hall's theorem).
    """
    most, sizes = 0, sorted(slots)
    for number, need in enumerate(sorted(experts, reverse=True), 1):
        most = max(most, number - (len(sizes) - bisect_left(sizes, need)))
    return most
