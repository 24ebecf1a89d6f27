"""Random histories of the cache against a slow model that keeps every use and sorts when asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moe_local.cache import lfu
from moe_local.cache.expert_cache import ExpertCache, ShortageError
from moe_local.cache.policies import POLICIES
from moe_local.cache.slots import CacheStateError

SLOTS = (4, 2)
EXPERTS = 6
HALF_LIFE = 5

experts_lists = st.lists(st.integers(0, EXPERTS - 1), unique=True, min_size=1, max_size=3)
layer_numbers = st.integers(0, len(SLOTS) - 1)
expert_numbers = st.integers(0, EXPERTS - 1)


@dataclass
class Entry:
    loading: bool = True
    pins: int = 0
    unused_prefetch: bool = False


@dataclass
class LayerModel:
    """One layer: who is present, all uses of every expert, and the order in which things happened."""

    present: dict[int, Entry] = field(default_factory=dict)
    uses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """By expert: how many uses of any expert came before its step, and its place among the step's."""
    admitted: dict[int, int] = field(default_factory=dict)
    recent: dict[int, int] = field(default_factory=dict)
    """When an expert was last admitted or, being present, used."""
    used: int = 0
    events: int = 0

    def need(self, experts: Sequence[int]) -> None:
        for place, expert in enumerate(experts):
            self.uses.setdefault(expert, []).append((self.used, place))
        self.used += len(experts)

    def happen(self, expert: int) -> int:
        self.events += 1
        self.recent[expert] = self.events
        return self.events

    def admit(self, expert: int) -> Entry:
        self.admitted[expert] = self.happen(expert)
        self.present[expert] = Entry()
        return self.present[expert]

    def movable(self, keep: Collection[int]) -> list[int]:
        return [e for e, s in self.present.items() if not s.loading and not s.pins and e not in keep]


def _last_use(layer: LayerModel, expert: int) -> float:
    return layer.recent[expert]


def _faded_uses(layer: LayerModel, expert: int) -> float:
    uses = layer.uses.get(expert, [])
    return sum(2.0 ** ((before - layer.used) / HALF_LIFE) * lfu._NEXT_CHOICE**place for before, place in uses)


def _admission(layer: LayerModel, expert: int) -> float:
    return layer.admitted[expert]


COLDNESS: dict[str, Callable[[LayerModel, int], float]] = {
    "lru": _last_use,
    "lfu": _faded_uses,
    "fifo": _admission,
}


def _size(layer: int, expert: int) -> int:
    return 100 * (layer + 1) + expert


def _facts(cache: ExpertCache) -> list[Any]:
    """Everything observable, to see that a refused call changed nothing."""
    facts: list[Any] = [cache.stats.snapshot()]
    for layer in range(len(SLOTS)):
        facts += [
            [cache.expert_in(layer, slot) for slot in range(cache.slots(layer))],
            cache.loading(layer),
            cache.prefetching(layer),
            [cache.pins(layer, expert) for expert in range(EXPERTS)],
            list(cache._pools[layer].policy.coldest()),
        ]
    return facts


class CacheMachine(RuleBasedStateMachine):
    """Subclassed for each policy, which sets `policy`."""

    policy = ""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ExpertCache(SLOTS, self.policy, _size)
        self.layers = [LayerModel() for _ in SLOTS]
        self.slots = list(SLOTS)
        self.hits = self.misses = self.evictions = 0
        self.issued = self.used = self.late = self.wasted_bytes = 0

    # The model

    def _refused(self, error: type[Exception], call: Callable[[], object]) -> None:
        before = _facts(self.cache)
        with pytest.raises(error):
            call()
        assert _facts(self.cache) == before

    def _evict(self, number: int, keep: Collection[int]) -> None:
        layer = self.layers[number]
        victim = min(layer.movable(keep), key=lambda expert: self._coldness()(layer, expert))
        if layer.present.pop(victim).unused_prefetch:
            self.wasted_bytes += _size(number, victim)
        self.evictions += 1

    def _coldness(self) -> Callable[[LayerModel, int], float]:
        if self.policy != "adaptive":
            return COLDNESS[self.policy]
        duel = self.cache._pools[0].policy._duel  # type: ignore[attr-defined]
        return _last_use if duel.recency else _faded_uses

    def _some(self, data: st.DataObject, number: int, wanted: Callable[[Entry], bool]) -> int | None:
        choices = sorted(e for e, entry in self.layers[number].present.items() if wanted(entry))
        return data.draw(st.sampled_from(choices)) if choices else None

    # What may happen

    @rule(number=layer_numbers, experts=experts_lists)
    def acquire(self, number: int, experts: list[int]) -> None:
        layer = self.layers[number]
        absent = [e for e in experts if e not in layer.present]
        room = self.slots[number] - len(layer.present) + len(layer.movable(experts))
        lacking = max(0, len(absent) - room)
        assert self.cache.shortage(number, experts) == lacking
        if lacking:
            self._refused(ShortageError, lambda: self.cache.acquire(number, experts))
            return
        present = [e for e in experts if e in layer.present]
        joined = [e for e in present if layer.present[e].loading]
        for expert in present:
            entry = layer.present[expert]
            self.used += entry.unused_prefetch and not entry.loading
            self.late += entry.unused_prefetch and entry.loading
            entry.unused_prefetch = False
        # The real cache goes first: what an adaptive policy follows may change with the step.
        granted = self.cache.acquire(number, experts)
        layer.need(experts)
        for expert in present:
            layer.happen(expert)
        while len(layer.present) + len(absent) > self.slots[number]:
            self._evict(number, experts)
        for expert in absent:
            layer.admit(expert)
        for expert in experts:
            layer.present[expert].pins += 1
        self.hits += len(present) - len(joined)
        self.misses += len(absent) + len(joined)

        assert granted.load == tuple(absent)
        assert granted.joined == tuple(joined)
        assert granted.slots == [self.cache.slot_of(number, expert) for expert in experts]

    @rule(data=st.data(), number=layer_numbers)
    def release(self, data: st.DataObject, number: int) -> None:
        """Part of what is out, so that waves and overlapping leases occur."""
        pinned = sorted(e for e, entry in self.layers[number].present.items() if entry.pins)
        experts = data.draw(st.lists(st.sampled_from(pinned), unique=True)) if pinned else []
        self.cache.release(number, experts)
        for expert in experts:
            self.layers[number].present[expert].pins -= 1

    @rule(number=layer_numbers, expert=expert_numbers, keep=st.frozensets(expert_numbers, max_size=2))
    def reserve(self, number: int, expert: int, keep: frozenset[int]) -> None:
        layer = self.layers[number]
        full = len(layer.present) == self.slots[number]
        if expert in layer.present or (full and not layer.movable(keep)):
            before = _facts(self.cache)
            assert self.cache.reserve(number, expert, keep) is None
            assert _facts(self.cache) == before
            return
        if full:
            self._evict(number, keep)
        layer.admit(expert).unused_prefetch = True
        self.issued += 1
        slot = self.cache.reserve(number, expert, keep)
        assert slot is not None
        assert self.cache.expert_in(number, slot) == expert

    @rule(number=layer_numbers, expert=expert_numbers)
    def preload(self, number: int, expert: int) -> None:
        layer = self.layers[number]
        if expert in layer.present or len(layer.present) == self.slots[number]:
            self._refused(CacheStateError, lambda: self.cache.preload(number, expert))
            return
        layer.admit(expert)
        assert self.cache.expert_in(number, self.cache.preload(number, expert)) == expert

    @rule(number=layer_numbers, experts=experts_lists)
    def pass_over(self, number: int, experts: list[int]) -> None:
        """Computed elsewhere: all of them, or refused."""
        layer = self.layers[number]
        if any(e in layer.present and not layer.present[e].loading for e in experts):
            self._refused(CacheStateError, lambda: self.cache.pass_over(number, experts))
            return
        self.cache.pass_over(number, experts)
        layer.need(experts)
        for expert in experts:
            entry = layer.present.get(expert)
            if entry:
                self.late += entry.unused_prefetch
                entry.unused_prefetch = False
        self.misses += len(experts)

    @rule(number=layer_numbers, experts=experts_lists)
    def whole_step(self, number: int, experts: list[int]) -> None:
        """What most steps are: everything arrives, the kernels run, everything is given back."""
        for expert, entry in self.layers[number].present.items():
            if entry.loading:
                entry.loading = False
                self.cache.complete(number, expert)
        before = self.hits + self.misses
        self.acquire(number, experts)
        if self.hits + self.misses > before:
            self.cache.release(number, experts)
            for expert in experts:
                self.layers[number].present[expert].pins -= 1

    @rule(number=layer_numbers, experts=experts_lists, settle=st.booleans())
    def served_elsewhere(self, number: int, experts: list[int], settle: bool) -> None:
        """Others fill slots in the order that they were given, and tell afterwards."""
        layer, cache = self.layers[number], self.cache
        if settle:
            self.release_all(number)
            for expert, entry in layer.present.items():
                if entry.loading:
                    entry.loading = False
                    cache.complete(number, expert)
        own = [slot for e in experts if (slot := cache.slot_of(number, e)) is not None]
        order = cache.elsewhere.next_filled(number, self.slots[number])
        to_fill = iter([slot for slot in order if slot not in own])
        absent = [e for e in experts if e not in layer.present]
        filled = [next(to_fill, self.slots[number] + 1) if e in absent else -1 for e in experts]
        loading = any(entry.loading for entry in layer.present.values())
        if loading or any(slot > self.slots[number] for slot in filled):
            if loading:
                filled = [min(slot, self.slots[number] - 1) for slot in filled]
                self._refused(CacheStateError, lambda: cache.elsewhere.follow(number, experts, filled))
            return
        wrong = [0 if slot < 0 else -1 for slot in filled]
        self._refused(CacheStateError, lambda: cache.elsewhere.follow(number, experts, wrong))
        if own and absent:
            wrong = [own[0] if slot >= 0 else -1 for slot in filled]
            self._refused(CacheStateError, lambda: cache.elsewhere.follow(number, experts, wrong))
        for expert in experts:
            if expert in layer.present:
                self.used += layer.present[expert].unused_prefetch
                layer.present[expert].unused_prefetch = False
        room = [cache.expert_in(number, slot) for slot in filled if slot >= 0]
        cache.elsewhere.follow(number, experts, filled)
        layer.need(experts)
        for expert in experts:
            if expert in layer.present:
                layer.happen(expert)
        for expert in room:
            if expert is not None:
                if layer.present.pop(expert).unused_prefetch:
                    self.wasted_bytes += _size(number, expert)
                self.evictions += 1
        for expert in absent:
            layer.admit(expert).loading = False
        assert [cache.slot_of(number, e) for e in absent] == [slot for slot in filled if slot >= 0]

    @rule(number=layer_numbers, experts=experts_lists, arrives=st.booleans())
    def prefetch_and_need(self, number: int, experts: list[int], arrives: bool) -> None:
        """A prefetch that is right, in time or late; without this, chance seldom gets there."""
        self.reserve(number, experts[-1], frozenset())
        entry = self.layers[number].present.get(experts[-1])
        if entry and entry.loading and arrives:
            entry.loading = False
            self.cache.complete(number, experts[-1])
        self.acquire(number, experts)

    @rule(number=layer_numbers)
    def release_all(self, number: int) -> None:
        for expert, entry in self.layers[number].present.items():
            for _ in range(entry.pins):
                self.cache.release(number, [expert])
            entry.pins = 0

    @rule(data=st.data(), number=layer_numbers)
    def complete(self, data: st.DataObject, number: int) -> None:
        expert = self._some(data, number, lambda entry: entry.loading)
        if expert is not None:
            self.cache.complete(number, expert)
            self.layers[number].present[expert].loading = False

    @rule(data=st.data(), number=layer_numbers, moved=st.integers(0, 50))
    def abandon(self, data: st.DataObject, number: int, moved: int) -> None:
        expert = self._some(data, number, lambda entry: entry.loading)
        if expert is not None:
            self.cache.abandon(number, expert, moved)
            if self.layers[number].present.pop(expert).unused_prefetch:
                self.wasted_bytes += moved

    @precondition(lambda self: sum(self.slots) > 3)
    @rule(data=st.data(), number=layer_numbers, settle=st.booleans())
    def keep_slots(self, data: st.DataObject, number: int, settle: bool) -> None:
        """The layer loses its highest slots, unless one of them is pinned or loading; one stays."""
        left = data.draw(st.integers(1, self.slots[number]))
        layer = self.layers[number]
        if settle:  # without this, chance seldom gets there
            self.release_all(number)
            for expert, entry in layer.present.items():
                if entry.loading:
                    entry.loading = False
                    self.cache.complete(number, expert)
        leaving = [e for e in layer.present if (self.cache.slot_of(number, e) or 0) >= left]
        assert sorted(self.cache.in_slots(number, left)) == sorted(leaving)
        if any(layer.present[e].loading or layer.present[e].pins for e in leaving):
            self._refused(CacheStateError, lambda: self.cache.keep_slots(number, left))
            return
        for expert in leaving:
            if layer.present.pop(expert).unused_prefetch:
                self.wasted_bytes += _size(number, expert)
        self.evictions += len(leaving)
        assert self.cache.keep_slots(number, left) == len(leaving)
        self.slots[number] = left
        assert self.cache.slots(number) == left

    # What must be refused

    @rule(number=layer_numbers, experts=experts_lists)
    def misuse(self, number: int, experts: list[int]) -> None:
        present = self.layers[number].present
        first = experts[0]
        self._refused(CacheStateError, lambda: self.cache.acquire(number, [*experts, first]))
        self._refused(CacheStateError, lambda: self.cache.release(number, [*experts, first]))
        if any(e not in present or not present[e].pins for e in experts):
            self._refused(CacheStateError, lambda: self.cache.release(number, experts))
        if first not in present or not present[first].loading:
            self._refused(CacheStateError, lambda: self.cache.complete(number, first))
            self._refused(CacheStateError, lambda: self.cache.abandon(number, first))

    # What holds at all times

    @invariant()
    def tables_agree(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def cache_is_as_the_model_says(self) -> None:
        for number, layer in enumerate(self.layers):
            present = layer.present
            assert set(self.cache.loading(number)) == {e for e in present if present[e].loading}
            assert set(self.cache.residents(number)) == {e for e in present if not present[e].loading}
            assert self.cache.free(number) == self.slots[number] - len(present)
            assert set(self.cache.prefetching(number)) == {
                e for e in present if present[e].loading and present[e].unused_prefetch
            }
            for expert in range(EXPERTS):
                entry = present.get(expert)
                assert self.cache.pins(number, expert) == (entry.pins if entry else 0)
                assert (self.cache.slot_of(number, expert) is None) == (entry is None)
                assert self.cache.is_resident(number, expert) == (entry is not None and not entry.loading)
            order = list(self.cache._pools[number].policy.coldest())
            by_coldness = self._coldness()
            assert order == sorted(present, key=lambda expert: by_coldness(layer, expert))

    @invariant()
    def counters_are_as_the_model_says(self) -> None:
        stats = self.cache.stats
        assert (stats.hits, stats.misses, stats.evictions) == (self.hits, self.misses, self.evictions)
        prefetch = stats.prefetch
        assert (prefetch.issued, prefetch.used, prefetch.late) == (self.issued, self.used, self.late)
        assert prefetch.wasted_bytes == self.wasted_bytes
        assert prefetch.used + prefetch.late <= prefetch.issued


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_random_histories(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfu, "HALF_LIFE_USES", HALF_LIFE)
    monkeypatch.setattr(lfu, "_LARGEST_WEIGHT", 4.0)
    machine = type("Machine", (CacheMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
