"""Slots of several sizes: what a slow matching says, and histories in which nothing gets stuck."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.cache.expert_cache import ExpertCache, ShortageError
from moe_local.cache.ladder import slot_ladder
from moe_local.cache.lru import LRUPolicy
from moe_local.cache.policies import POLICIES
from moe_local.cache.sized_slots import SizedSlotPool
from moe_local.cache.slots import CacheStateError

sizes_lists = st.lists(st.sampled_from([2, 3, 4, 8]), min_size=2, max_size=12).map(tuple)


@given(sizes=sizes_lists, top_k=st.integers(1, 4), data=st.data())
def test_a_ladder_has_one_slot_for_each_expert_of_its_own_size(
    sizes: tuple[int, ...], top_k: int, data: st.DataObject
) -> None:
    uses = st.none() | st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)).map(tuple)
    use = data.draw(uses)
    ladder = slot_ladder(sizes, top_k, use)
    assert sorted(ladder) == sorted(sizes)
    assert ladder[0] == max(sizes)  # any expert has a slot, however few there are


def test_of_each_size_as_much_as_it_is_used() -> None:
    sizes = (8,) * 4 + (2,) * 12
    alike = slot_ladder(sizes, 2)
    assert [alike[:8].count(8), alike.count(8)] == [2, 4]
    assert slot_ladder(sizes, 2, (0,) * 16) == alike  # nobody has been used yet
    hot = slot_ladder(sizes, 2, (30,) * 4 + (1,) * 12)
    assert [hot[:5].count(8), hot[:6].count(8)] == [4, 4]
    cold = slot_ladder(sizes, 2, (0,) * 4 + (9,) * 12)
    assert [cold[:14].count(8), cold.count(8)] == [2, 4]
    assert slot_ladder((4,) * 3, 2) == (4,) * 3


def test_the_first_slots_hold_what_tokens_mostly_need_at_once() -> None:
    assert slot_ladder((8,) * 4 + (2,) * 4, 2)[:2] == (8, 8)  # both, every fourth time
    assert slot_ladder((8,) * 2 + (2,) * 126, 8)[:8] == (8, 8) + (2,) * 6
    assert slot_ladder((8,) * 16 + (2,) * 112, 8)[:8] == (8, 8) + (2,) * 6
    assert slot_ladder((8,) * 127 + (2,), 8)[:8] == (8,) * 8


def most_placed(slots: Sequence[int], experts: Sequence[int]) -> int:
    """By trying everything: how many experts find slots."""
    best = 0
    for order in permutations(slots, min(len(slots), len(experts))):
        for some in permutations(experts, len(order)):
            best = max(best, sum(size >= need for size, need in zip(order, some, strict=True)))
    return best


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_room_is_what_the_best_placement_finds(data: st.DataObject) -> None:
    need = dict(enumerate(data.draw(st.lists(st.integers(1, 4), min_size=6, max_size=6))))
    slots = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=4))
    pool = SizedSlotPool(slots, LRUPolicy(), need.__getitem__)
    for expert in data.draw(st.lists(st.integers(0, 5), unique=True)):
        if pool.has_room(expert):
            pool.place(expert)
            if data.draw(st.booleans()):
                del pool.loading[expert]
    pool.check_integrity()
    asked = data.draw(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=3))
    absent = [expert for expert in asked if expert not in pool.table]
    usable = [slots[slot] for slot in pool.free]
    usable += [slots[pool.table[e]] for e in pool.table if e not in pool.loading and e not in asked]
    lacking = len(absent) - most_placed(usable, [need[e] for e in absent])
    assert pool.lacking(set(asked), absent) == lacking
    taken = [slot for e, slot in pool.table.items() if e in asked]
    others = [size for slot, size in enumerate(slots) if slot not in taken]
    assert pool.fits(asked) == (most_placed(others, [need[e] for e in absent]) == len(absent))
    chosen = pool.at_once(asked)
    assert most_placed(slots, [need[e] for e in chosen]) == len(chosen)
    for number, expert in enumerate(asked):
        if expert not in chosen:  # there was no room left beside those before it
            before = [e for e in asked[:number] if e in chosen]
            assert most_placed(slots, [need[e] for e in (*before, expert)]) == len(before)
    for victim in pool.victims(set(asked), absent):
        pool.remove(victim)
    if not lacking:
        for expert in absent:
            pool.place(expert)  # finds a slot, whatever the order
    pool.check_integrity()


def test_a_victim_of_the_same_size_first() -> None:
    need = {0: 8, 1: 2, 2: 2, 3: 2, 4: 8}
    pool = SizedSlotPool([8, 2, 2], LRUPolicy(), need.__getitem__)
    for expert in (0, 1, 2):
        del pool.loading[pool_place(pool, expert)]
    assert pool.victims((), [3]) == [1]  # though 0 is colder
    assert pool.victims((), [4]) == [0]
    assert pool.victims({1, 2}, [3]) == [0]
    assert pool.victims((), [4, 3]) == [0, 1]
    pool.pins[0] = 1
    assert pool.victims((), [4]) == []
    assert pool.victims((), [4], pinned=True) == [0]
    assert pool.lacking((), [4]) == 1


def pool_place(pool: SizedSlotPool, expert: int) -> int:
    pool.place(expert)
    return expert


def test_integrity_notices_what_is_too_large() -> None:
    need = {0: 8, 1: 2}
    pool = SizedSlotPool([8, 2], LRUPolicy(), need.__getitem__)
    pool.place(1)
    need[1] = 4
    with pytest.raises(CacheStateError, match="slot 1 of 2 bytes, which is too small"):
        pool.check_integrity()
    need[1] = 2
    pool._sizes.append(8)
    with pytest.raises(CacheStateError, match="3 slots have a size, there are 2"):
        pool.check_integrity()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(6))
def test_histories_in_which_nothing_gets_stuck(policy: str, seed: int) -> None:
    """Leases, prefetches, failures, fewer slots; every step is served at last, in waves if need be."""
    chance = random.Random(seed)
    sizes = [tuple(chance.choices([2, 3, 4, 8], k=8)) for _ in range(2)]
    ladders = [slot_ladder(each, 3) for each in sizes]
    slots = [chance.randint(3, 8) for _ in sizes]
    cache = ExpertCache(slots, policy, lambda layer, e: sizes[layer][e], staging=2, slot_sizes=ladders)
    held: list[tuple[int, list[int]]] = []
    for _ in range(300):
        layer = chance.randrange(2)
        experts = chance.sample(range(8), chance.randint(1, 4))
        match chance.randrange(7):
            case 0:
                cache.reserve(layer, experts[0], keep=experts[1:])
            case 1 if cache.loading(layer):
                cache.abandon(layer, chance.choice(cache.loading(layer)), 1)
                held = [(at, [e for e in some if cache.pins(at, e)]) for at, some in held]
            case 2 if cache.slot_of(layer, experts[0]) is None:
                cache.staging.stage(layer, experts[0], ahead=True)
            case 3:
                for expert in cache.loading(layer):
                    cache.complete(layer, expert)
            case 4:
                cache.staging.clear(layer, [])
            case _:
                if cache.shortage(layer, experts):
                    with pytest.raises(ShortageError):
                        cache.acquire(layer, experts)
                    for at, some in held:
                        cache.release(at, some)
                    held = []
                    serve_in_waves(cache, layer, experts)
                else:
                    cache.acquire(layer, experts)
                    held.append((layer, experts))
        cache.check_integrity()
        if chance.random() < 0.3 and held:
            at, some = held.pop()
            cache.release(at, some)
    for at, some in held:
        cache.release(at, some)
    for layer in range(2):
        for expert in cache.loading(layer):
            cache.complete(layer, expert)
        left = chance.randint(1, slots[layer])
        cache.keep_slots(layer, left)
        cache.check_integrity()
        serve_in_waves(cache, layer, list(range(8)))
    cache.empty()
    cache.check_integrity()


def serve_in_waves(cache: ExpertCache, layer: int, experts: list[int]) -> None:
    """As the store does: as many at once as there is room for, those that are here first."""
    for expert in cache.loading(layer):
        cache.complete(layer, expert)
    todo = sorted(experts, key=lambda expert: cache.slot_of(layer, expert) is None)
    while todo:
        wave = todo[: cache.slots(layer)]
        while cache.shortage(layer, wave):
            wave.pop()
        assert wave, "nothing is pinned, and an expert finds no slot"
        for expert in cache.acquire(layer, wave).load:
            cache.complete(layer, expert)
        cache.check_integrity()
        cache.release(layer, wave)
        todo = todo[len(wave) :]


def test_slots_of_one_size_are_what_they_were() -> None:
    sizes = [(4,) * 6, (8, 2, 2, 2, 2, 2)]
    cache = ExpertCache([3, 3], "lru", lambda layer, e: sizes[layer][e], slot_sizes=sizes)
    assert [cache.several_sizes(layer) for layer in range(2)] == [False, True]
