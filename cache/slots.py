"""One layer's slots: which expert is in which of them, and which are loading or pinned."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice

from moe_local.cache.policy import EvictionPolicy


class CacheStateError(RuntimeError):
    """A cache was asked for something its state forbids, or its tables disagree: a fault in the code."""


class SlotPool:
    """The slots of one layer, whose number can only shrink, and the tables of the experts in them.

    A *present* expert is loading or resident. Slots are numbered from 0; a *staged* expert is instead in a
    slot of the StagingRing, which has a negative number, and is unknown to the policy. `ExpertCache` reads
    the attributes directly, since its fast path cannot afford a call per expert; only the methods here change
    `table`, `expert_in`, `free`, `staged` and the policy, so that these stay consistent.
    """

    __slots__ = ("expert_in", "free", "loading", "pins", "policy", "staged", "table", "unused")

    def __init__(self, slots: int, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.table: dict[int, int] = {}
        """Slot of each present expert."""
        self.expert_in: list[int | None] = [None] * slots
        """The expert in each slot, if any: `table` reversed."""
        self.free = list(range(slots - 1, -1, -1))
        """Empty slots; the last one is given out first."""
        self.pins: dict[int, int] = {}
        """How often each pinned (leased) expert is pinned; others are not in it."""
        self.loading: dict[int, None] = {}
        """Experts whose bytes are being loaded, in the order in which they were admitted."""
        self.unused: set[int] = set()
        """Experts that were or are being prefetched and have not been needed so far."""
        self.staged: set[int] = set()
        """Present experts that are in slots of the StagingRing."""

    def fresh(self, policy: EvictionPolicy) -> SlotPool:
        """An empty pool with as many slots."""
        return SlotPool(len(self.expert_in), policy)

    def take(self, expert: int) -> int:
        """Choose a free slot for an expert and remove it from `free`."""
        return self.free.pop()

    def place(self, expert: int) -> int:
        """Put an absent expert into a free slot, as loading, and insert it into the policy."""
        slot = self.take(expert)
        self.table[expert] = slot
        self.expert_in[slot] = expert
        self.loading[expert] = None
        self.policy.insert(expert)
        return slot

    def put(self, expert: int, slot: int) -> None:
        """Put an absent expert into this free slot, as resident, and insert it into the policy."""
        self.free.remove(slot)
        self.table[expert] = slot
        self.expert_in[slot] = expert
        self.policy.insert(expert)

    def stage(self, expert: int, slot: int) -> None:
        """Put an absent expert into a slot of the StagingRing, as loading."""
        self.table[expert] = slot
        self.staged.add(expert)
        self.loading[expert] = None

    def admit(self, expert: int) -> int:
        """Move a staged expert to a free slot of the layer, and insert it into the policy."""
        slot = self.table[expert] = self.take(expert)
        self.expert_in[slot] = expert
        self.staged.remove(expert)
        self.policy.insert(expert)
        return slot

    def remove(self, expert: int) -> int:
        """Make a present expert absent, whatever its state. Returns its slot, of the layer or of the ring."""
        slot = self.table.pop(expert)
        if slot >= 0:
            self.expert_in[slot] = None
            self.free.append(slot)
            self.policy.remove(expert)
        else:
            self.staged.remove(expert)
        self.loading.pop(expert, None)
        self.pins.pop(expert, None)
        self.unused.discard(expert)
        return slot

    def keep(self, slots: int) -> None:
        """Remove all but the first `slots` slots; those removed must be empty."""
        del self.expert_in[slots:]
        self.free = [slot for slot in self.free if slot < slots]

    # Room. These methods take experts rather than counts, since slots may differ in size (SizedSlotPool).

    def has_room(self, expert: int) -> bool:
        """Whether there is a free slot that an absent expert fits in."""
        return bool(self.free)

    def fits(self, experts: Sequence[int]) -> bool:
        """Whether these could all have slots if nothing else were pinned; present ones keep their slots."""
        return len(experts) <= len(self.expert_in)

    def at_once(self, experts: Sequence[int]) -> list[int]:
        """The experts that would get slots if all of these were put into the empty layer, in this order."""
        return list(experts[: len(self.expert_in)])

    def lacking(self, experts: Container[int], absent: Sequence[int]) -> int:
        """How many slots are missing to admit all of `absent` without evicting any of `experts`."""
        need = len(absent) - len(self.free)
        if need <= 0:
            return 0
        return need - sum(1 for _ in islice(self._evictable(self.table, experts), need))

    def victims(self, keep: Container[int], absent: Sequence[int], *, pinned: bool = False) -> list[int]:
        """Experts to evict so that all of `absent` have slots: resident, unpinned, not in `keep`.

        They are chosen in the policy's order. There may be too few. `pinned`: pinned ones qualify, too.
        """
        return self.coldest(keep, max(0, len(absent) - len(self.free)), pinned=pinned)

    def coldest(self, keep: Container[int], count: int, *, pinned: bool = False) -> list[int]:
        """The policy's `count` best victims, whatever the sizes of their slots; arguments as in `victims`."""
        order = self._coldest_but(keep) if pinned else self._evictable(self.policy.coldest(), keep)
        return list(islice(order, count))

    def _coldest_but(self, keep: Container[int]) -> Iterator[int]:
        """Residents that are not in `keep`, pinned or not, the best victim first."""
        return (e for e in self.policy.coldest() if e not in keep and e not in self.loading)

    def _evictable(self, order: Iterable[int], keep: Container[int]) -> Iterator[int]:
        pins, loading, staged = self.pins, self.loading, self.staged
        return (e for e in order if e not in pins and e not in loading and e not in keep and e not in staged)

    def check_integrity(self) -> None:
        """Raise CacheStateError with the facts unless every table agrees with every other."""
        for fault in self._faults():
            raise CacheStateError(fault)

    def _faults(self) -> Iterator[str]:
        present = set(self.table)
        admitted = present - self.staged
        loading, resident = admitted & self.loading.keys(), admitted - self.loading.keys()
        empty = [slot for slot, expert in enumerate(self.expert_in) if expert is None]
        if len(self.free) + len(loading) + len(resident) != len(self.expert_in):
            yield (
                f"free {self.free} + loading {sorted(loading)} + resident {sorted(resident)} "
                f"are not the {len(self.expert_in)} slots"
            )
        if {e: slot for e, slot in self.table.items() if slot >= 0} != {
            e: slot for slot, e in enumerate(self.expert_in) if e is not None
        }:
            yield f"slots of experts {self.table} and experts in slots {self.expert_in} disagree"
        if self.staged != {e for e, slot in self.table.items() if slot < 0}:
            yield f"staged are {sorted(self.staged)}, but the slots are {self.table}"
        if sorted(self.free) != empty:
            yield f"free slots {sorted(self.free)} are not the empty ones {empty}"
        if not self.loading.keys() <= present:
            yield f"loading {list(self.loading)}, but only {sorted(present)} have slots"
        if not self.pins.keys() <= present or any(pins <= 0 for pins in self.pins.values()):
            yield f"pins {self.pins}, where only {sorted(present)} have slots"
        if not self.unused <= present:
            yield f"prefetched {sorted(self.unused)}, but only {sorted(present)} have slots"
        known = sorted(self.policy.coldest())
        if known != sorted(admitted) or len(self.policy) != len(admitted):
            yield f"the policy knows {len(self.policy)} experts {known}, in slots are {sorted(admitted)}"


def add_pins(pool: SlotPool, experts: Iterable[int]) -> None:
    """Add one pin to each of these present experts."""
    pins = pool.pins
    for expert in experts:
        pins[expert] = pins.get(expert, 0) + 1
