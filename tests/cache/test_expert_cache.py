"""Each transition of the state machine, and what each of them counts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from moe_local.cache.errors import OptionError
from moe_local.cache.expert_cache import Acquisition, ExpertCache, ShortageError
from moe_local.cache.slots import CacheStateError
from moe_local.cache.stats import PrefetchStats


def _size(layer: int, expert: int) -> int:
    return 1000 * (layer + 1) + expert


def _filled(slots: int, *experts: int) -> ExpertCache:
    """Two layers; layer 0 holds `experts`, the first one the coldest."""
    cache = ExpertCache([slots, slots], sizes=_size)
    for expert in experts:
        cache.preload(0, expert)
        cache.complete(0, expert)
    return cache


def _step(cache: ExpertCache, experts: Sequence[int]) -> Acquisition:
    granted = cache.acquire(0, experts)
    for expert in (*granted.load, *granted.joined):
        cache.complete(0, expert)
    cache.release(0, experts)
    cache.check_integrity()
    return granted


def test_an_empty_cache() -> None:
    cache = ExpertCache([3, 5])
    assert (cache.layers, cache.slots(0), cache.slots(1)) == (2, 3, 5)
    assert (cache.free(0), cache.residents(0), cache.loading(0)) == (3, (), ())
    assert cache.slot_of(0, 4) is None
    assert cache.expert_in(0, 2) is None
    assert not cache.is_resident(0, 4)
    assert cache.pins(0, 4) == 0
    cache.check_integrity()


def test_absent_loading_resident_absent() -> None:
    cache = ExpertCache([1])
    granted = cache.acquire(0, [6])
    assert granted == Acquisition([0], (6,), ())
    assert (cache.slot_of(0, 6), cache.is_resident(0, 6), cache.loading(0)) == (0, False, (6,))
    cache.complete(0, 6)
    assert (cache.slot_of(0, 6), cache.is_resident(0, 6), cache.loading(0)) == (0, True, ())
    assert cache.pins(0, 6) == 1
    cache.release(0, [6])
    assert cache.acquire(0, [2]).load == (2,)
    assert cache.slot_of(0, 6) is None
    assert cache.expert_in(0, 0) == 2
    assert (cache.stats.hits, cache.stats.misses, cache.stats.evictions) == (0, 2, 1)


def test_slots_come_in_the_routers_order_and_count_from_zero() -> None:
    cache = ExpertCache([3])
    assert cache.acquire(0, [9, 4, 6]).slots == [0, 1, 2]
    assert cache.acquire(0, [6, 9]).slots == [2, 0]


def test_layers_do_not_disturb_each_other() -> None:
    cache = _filled(2, 1, 2)
    cache.acquire(1, [5, 6])
    assert cache.residents(0) == (1, 2)
    assert cache.stats.misses_by_layer == [0, 2]
    with pytest.raises(KeyError):
        cache.acquire(-1, [5])


def test_hits_are_touched_before_the_absent_are_admitted() -> None:
    cache = _filled(4, 1, 2, 3, 4)
    granted = _step(cache, [7, 1])
    assert granted.load == (7,)
    assert cache.slot_of(0, 2) is None
    # From cold to hot now 3, 4, 1, 7: the hit was touched first, though the router named it last.
    _step(cache, [8, 9])
    assert sorted(cache.residents(0)) == [1, 7, 8, 9]
    _step(cache, [5])
    assert sorted(cache.residents(0)) == [5, 7, 8, 9]


def test_the_steps_own_experts_are_never_its_victims() -> None:
    cache = _filled(3, 1, 2, 3)
    assert _step(cache, [8, 1]).load == (8,)
    assert sorted(cache.residents(0)) == [1, 3, 8]


def test_pinned_experts_stay() -> None:
    cache = _filled(3, 1, 2, 3)
    cache.acquire(0, [1, 2])
    cache.acquire(0, [4])
    assert cache.slot_of(0, 3) is None
    assert cache.shortage(0, [5, 6]) == 2
    cache.release(0, [1])
    assert cache.shortage(0, [5, 6]) == 1
    assert cache.shortage(0, [5]) == 0


def test_a_shortage_changes_nothing() -> None:
    cache = _filled(3, 1, 2, 3)
    cache.acquire(0, [2, 3])
    with pytest.raises(ShortageError, match=r"layer 0 needs experts \[1, 8, 9\] at once and lacks 2 slots"):
        cache.acquire(0, [1, 8, 9])
    assert sorted(cache.residents(0)) == [1, 2, 3]
    assert cache.pins(0, 1) == 0
    assert (cache.stats.hits, cache.stats.misses, cache.stats.evictions) == (2, 0, 0)
    cache.check_integrity()


def test_more_experts_than_slots_lack_the_difference() -> None:
    cache = ExpertCache([2])
    assert cache.shortage(0, [1, 2, 3, 4, 5]) == 3
    assert cache.shortage(0, []) == 0


def test_shortage_counts_loading_experts_as_immovable() -> None:
    cache = ExpertCache([2])
    cache.reserve(0, 1)
    assert cache.shortage(0, [5, 6]) == 1
    assert cache.shortage(0, [1, 6]) == 0


def test_pins_add_up_over_acquisitions() -> None:
    cache = _filled(2, 1)
    cache.acquire(0, [1])
    cache.acquire(0, [1])
    assert cache.pins(0, 1) == 2
    cache.release(0, [1])
    assert cache.pins(0, 1) == 1
    cache.release(0, [1])
    assert cache.pins(0, 1) == 0


def test_joining_a_demand_load_is_a_miss_but_no_late_prefetch() -> None:
    cache = ExpertCache([2])
    assert cache.acquire(0, [1]).load == (1,)
    assert cache.acquire(0, [1]) == Acquisition([0], (), (1,))
    assert cache.pins(0, 1) == 2
    assert (cache.stats.hits, cache.stats.misses) == (0, 2)
    assert cache.stats.prefetch == PrefetchStats()


def test_release_leaves_a_load_under_way() -> None:
    cache = ExpertCache([1])
    cache.acquire(0, [1])
    cache.release(0, [1])
    assert cache.loading(0) == (1,)
    assert cache.shortage(0, [2]) == 1
    cache.complete(0, 1)
    assert cache.shortage(0, [2]) == 0


def test_a_prefetch_in_time_is_a_hit_and_used_once() -> None:
    cache = ExpertCache([2])
    assert cache.reserve(0, 5) == 0
    assert cache.prefetching(0) == (5,)
    cache.complete(0, 5)
    _step(cache, [5])
    _step(cache, [5])
    assert (cache.stats.hits, cache.stats.misses) == (2, 0)
    assert cache.stats.prefetch == PrefetchStats(issued=1, used=1)


def test_a_late_prefetch_is_a_miss_and_from_then_on_a_demand_load() -> None:
    cache = ExpertCache([2], sizes=_size)
    cache.reserve(0, 5)
    assert cache.acquire(0, [5, 6]) == Acquisition([0, 1], (6,), (5,))
    assert (cache.stats.hits, cache.stats.misses) == (0, 2)
    assert cache.stats.prefetch == PrefetchStats(issued=1, late=1)
    assert cache.prefetching(0) == ()
    cache.abandon(0, 5, bytes_moved=300)
    assert cache.stats.prefetch.wasted_bytes == 0


def test_an_abandoned_prefetch_wastes_what_it_moved() -> None:
    cache = ExpertCache([1], sizes=_size)
    cache.reserve(0, 5)
    cache.abandon(0, 5, bytes_moved=300)
    assert cache.stats.prefetch == PrefetchStats(issued=1, wasted_bytes=300)
    assert cache.slot_of(0, 5) is None
    assert cache.free(0) == 1
    cache.check_integrity()


def test_a_prefetch_evicted_unused_wastes_its_size() -> None:
    cache = ExpertCache([1, 1], sizes=_size)
    cache.reserve(1, 5)
    cache.complete(1, 5)
    cache.acquire(1, [6])
    assert cache.stats.prefetch == PrefetchStats(issued=1, wasted_bytes=_size(1, 5))


def test_a_used_prefetch_wastes_nothing_when_evicted() -> None:
    cache = ExpertCache([1], sizes=_size)
    cache.reserve(0, 5)
    cache.complete(0, 5)
    _step(cache, [5])
    _step(cache, [6])
    assert cache.stats.prefetch == PrefetchStats(issued=1, used=1)


def test_reserve_takes_the_coldest_that_may_go() -> None:
    cache = _filled(4, 1, 2, 3, 4)
    cache.acquire(0, [1])
    assert cache.reserve(0, 7, keep={2}) == 2
    assert cache.slot_of(0, 3) is None
    assert cache.stats.evictions == 1
    cache.check_integrity()


def test_reserve_declines_what_is_present_or_has_no_room() -> None:
    cache = _filled(2, 1, 2)
    assert cache.reserve(0, 1) is None
    cache.acquire(0, [1])
    assert cache.reserve(0, 7, keep=(2,)) is None
    assert cache.reserve(0, 7) == 1
    assert cache.reserve(0, 7) is None
    assert cache.reserve(0, 8) is None
    assert cache.stats.prefetch.issued == 1


def test_what_is_passed_over_is_a_miss_and_changes_nothing() -> None:
    cache = _filled(2, 1, 2)
    cache.pass_over(0, [3, 4])
    assert (cache.stats.hits, cache.stats.misses) == (0, 2)
    assert set(cache.residents(0)) == {1, 2}
    assert cache.pins(0, 3) == 0
    with pytest.raises(CacheStateError, match="expert 1 is resident"):
        cache.pass_over(0, [5, 1])
    assert cache.stats.misses == 2


def test_a_prefetch_that_is_passed_over_was_late_and_goes_on() -> None:
    cache = _filled(2, 1)
    cache.reserve(0, 2)
    cache.pass_over(0, [2])
    assert (cache.stats.misses, cache.stats.prefetch_late) == (1, 1)
    assert cache.loading(0) == (2,)
    assert cache.prefetching(0) == ()
    cache.complete(0, 2)
    _step(cache, [2])
    assert (cache.stats.hits, cache.stats.prefetch_used) == (1, 0)


def test_promotion_takes_an_empty_slot_or_the_coldest_and_is_no_prefetch() -> None:
    cache = _filled(3, 1, 2)
    first = cache.promote(0, 3)
    assert first is not None
    assert first.victim is None
    cache.complete(0, 3)
    second = cache.promote(0, 4, keep=[1])
    assert second == (cache.slot_of(0, 4), 2)
    assert cache.promote(0, 4) is None
    assert cache.promote(0, 5, keep=[1, 3]) is None  # 4 is loading
    assert cache.stats.prefetch == PrefetchStats()
    assert (cache.stats.evictions, cache.stats.misses) == (1, 0)


def test_an_acquisition_names_its_victims() -> None:
    cache = _filled(3, 1, 2)
    acquired = cache.acquire(0, [2, 3, 4])
    assert acquired.load == (3, 4)
    assert acquired.victims == (1,)


def test_preload_counts_nothing() -> None:
    cache = _filled(2, 1, 2)
    assert (cache.stats.hits, cache.stats.misses, cache.stats.evictions) == (0, 0, 0)
    assert cache.stats.prefetch == PrefetchStats()
    _step(cache, [1, 2])
    assert (cache.stats.hits, cache.stats.prefetch.used) == (2, 0)


def test_preload_needs_an_absent_expert_and_a_free_slot() -> None:
    cache = _filled(2, 1)
    with pytest.raises(CacheStateError, match="expert 1 to preload is already in slot 0"):
        cache.preload(0, 1)
    cache.preload(0, 2)
    with pytest.raises(ShortageError, match="no free slot of 2 to preload expert 3"):
        cache.preload(0, 3)


def test_a_failed_demand_load_stays_a_miss_and_loses_its_pins() -> None:
    cache = ExpertCache([2], sizes=_size)
    cache.acquire(0, [1, 2])
    cache.complete(0, 1)
    cache.abandon(0, 2, bytes_moved=10)
    assert cache.pins(0, 2) == 0
    assert cache.stats.misses == 2
    assert cache.stats.prefetch.wasted_bytes == 0
    with pytest.raises(CacheStateError, match="released"):
        cache.release(0, [1, 2])
    assert cache.pins(0, 1) == 1
    cache.release(0, [1])
    cache.check_integrity()


@pytest.mark.parametrize("experts", [[1, 1], [2], [1, 2]])
def test_release_refuses_what_is_not_out_and_changes_nothing(experts: list[int]) -> None:
    cache = _filled(3, 1, 2)
    cache.acquire(0, [1])
    with pytest.raises(CacheStateError, match="released"):
        cache.release(0, experts)
    assert (cache.pins(0, 1), cache.pins(0, 2)) == (1, 0)


@pytest.mark.parametrize("expert", [1, 4])
def test_only_loading_experts_complete_or_are_abandoned(expert: int) -> None:
    cache = _filled(3, 1)
    cache.reserve(0, 2)
    with pytest.raises(CacheStateError, match=rf"expert {expert} is not loading; \[2\] are"):
        cache.complete(0, expert)
    with pytest.raises(CacheStateError, match=rf"expert {expert} is not loading; \[2\] are"):
        cache.abandon(0, expert)


def test_experts_of_one_acquisition_are_distinct() -> None:
    cache = _filled(3, 1)
    with pytest.raises(CacheStateError, match=r"\[1, 1\] are not distinct"):
        cache.acquire(0, [1, 1])
    assert cache.pins(0, 1) == 0


def test_a_batch_goes_through_in_waves() -> None:
    """Six experts through three slots: hits first, then the others take the slots of those that are done."""
    cache = _filled(3, 1, 2, 3)
    needed = [1, 3, 4, 5, 6]
    hits = [expert for expert in needed if cache.is_resident(0, expert)]
    waves = [hits, [4, 5, 6]]
    brought: list[int] = []
    for wave in waves:
        assert cache.shortage(0, wave) == 0
        brought += _step(cache, wave).load
    assert brought == [4, 5, 6]
    assert (cache.stats.hits, cache.stats.misses) == (2, 3)


def test_a_layer_may_have_no_slots_but_not_fewer() -> None:
    cache = ExpertCache([0, 1])
    assert cache.shortage(0, [3]) == 1
    assert cache.reserve(0, 3) is None
    with pytest.raises(OptionError, match="layer 1 has -2 slots"):
        ExpertCache([1, -2])


def test_check_integrity_names_the_layer() -> None:
    cache = _filled(2, 1)
    cache.stats.misses_by_layer[1] = -1
    with pytest.raises(CacheStateError, match="layer 1: a counter is negative"):
        cache.check_integrity()


def test_fewer_slots_evict_what_is_in_them_and_count_it() -> None:
    cache = ExpertCache([4], "lru", lambda layer, expert: 10)
    cache.acquire(0, [5, 6])
    for expert in (5, 6):
        cache.complete(0, expert)
    cache.release(0, [5, 6])
    slot = cache.reserve(0, 7)
    assert slot == 2
    cache.complete(0, 7)
    assert cache.in_slots(0, 1) == (6, 7)
    assert cache.keep_slots(0, 1) == 2
    cache.check_integrity()
    assert cache.residents(0) == (5,)
    assert (cache.slots(0), cache.free(0)) == (1, 0)
    assert cache.stats.evictions == 2
    assert cache.stats.prefetch.wasted_bytes == 10  # 7 had been brought for nothing
    cache.acquire(0, [1])  # goes on with what is left
    cache.check_integrity()


def test_a_slot_in_use_cannot_be_taken_away() -> None:
    cache = ExpertCache([3])
    cache.acquire(0, [5, 6])
    with pytest.raises(CacheStateError, match="slot 1 is to go while its expert 6 is pinned"):
        cache.keep_slots(0, 1)
    cache.release(0, [6])
    with pytest.raises(CacheStateError, match="slot 1 is to go while its expert 6 is loading"):
        cache.keep_slots(0, 1)
    assert cache.keep_slots(0, 2) == 0
    cache.check_integrity()


def test_emptied_it_is_as_new() -> None:
    cache = _filled(3, 4, 5, 6)
    _step(cache, [4, 7])
    counted = cache.stats.snapshot()
    cache.empty()
    cache.check_integrity()
    assert (cache.free(0), cache.free(1), cache.residents(0)) == (3, 3, ())
    assert cache.stats.snapshot() == counted
    assert _step(cache, [1, 2, 3]).victims == ()
    assert _step(cache, [9]).victims == (1,), "what was used before counts no more"


def test_emptied_for_another_policy() -> None:
    """FIFO evicts what came first, LRU what was used first: 1 is the oldest, and was used last."""
    for policy, victim in (("fifo", 1), ("lru", 2)):
        cache = ExpertCache([2], "lfu")
        cache.empty(policy)
        for experts in ([1], [2], [1], [3]):
            granted = _step(cache, experts)
        assert granted.victims == (victim,)
    with pytest.raises(OptionError, match="'best' is not known"):
        cache.empty("best")


def test_what_is_in_use_is_not_emptied() -> None:
    cache = _filled(3, 4)
    cache.acquire(0, [4])
    with pytest.raises(CacheStateError, match=r"pinned are \[4\]"):
        cache.empty()
    cache.release(0, [4])
    cache.reserve(1, 2)
    with pytest.raises(CacheStateError, match=r"layer 1 cannot be emptied: .* loading \[2\]"):
        cache.empty()
    assert cache.residents(0) == (4,)
    cache.check_integrity()


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_following_a_step_is_like_having_served_it(policy: str) -> None:
    """The slots that are to be filled next are those that `acquire` would fill, whatever the history."""
    served, followed = (ExpertCache([5], policy) for _ in range(2))
    rng = random.Random(policy)
    for _ in range(200):
        experts = rng.sample(range(12), 3)
        for expert in served.acquire(0, experts).load:
            served.complete(0, expert)
        served.release(0, experts)
        own = [followed.slot_of(0, expert) for expert in experts]
        to_fill = iter([slot for slot in followed.elsewhere.next_filled(0, 6) if slot not in own])
        followed.elsewhere.follow(0, experts, [next(to_fill) if slot is None else -1 for slot in own])
        followed.check_integrity()
        assert sorted(followed.residents(0)) == sorted(served.residents(0))
    assert followed.stats.evictions == served.stats.evictions > 200
    assert followed.stats.hits == followed.stats.misses == 0  # whoever served counts these
    assert followed.elsewhere.next_filled(0, 2) == followed.elsewhere.next_filled(0, 9)[:2]
