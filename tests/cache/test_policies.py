"""What every eviction policy must do, whatever its order; and the names by which users choose one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from moe_local.cache.errors import OptionError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.policies import POLICIES, policy_for
from moe_local.cache.policy import EvictionPolicy

MakePolicy = Callable[[], EvictionPolicy]


@pytest.fixture(params=sorted(POLICIES))
def make_policy(request: pytest.FixtureRequest) -> MakePolicy:
    name: str = request.param
    return policy_for(name)


def _shake(policy: EvictionPolicy, seed: int, steps: int = 300) -> set[int]:
    """Drive a policy as a cache would, at random; returns what it must know at the end."""
    chance = random.Random(seed)
    known: set[int] = set()
    for _ in range(steps):
        policy.touch(chance.sample(sorted(known), chance.randint(0, min(4, len(known)))))
        policy.pass_over(chance.sample(range(24), 2))
        expert = chance.randrange(24)
        if expert in known:
            policy.remove(expert)
            known.remove(expert)
        else:
            policy.insert(expert)
            known.add(expert)
        assert sorted(policy.coldest()) == sorted(known)
        assert len(policy) == len(known)
    return known


def test_a_new_policy_knows_nobody(make_policy: MakePolicy) -> None:
    policy = make_policy()
    assert list(policy.coldest()) == []
    assert len(policy) == 0
    policy.touch([])


@pytest.mark.parametrize("seed", range(5))
def test_knows_exactly_those_inserted_and_not_removed(make_policy: MakePolicy, seed: int) -> None:
    assert _shake(make_policy(), seed)


def test_walking_the_order_changes_nothing(make_policy: MakePolicy) -> None:
    policy = make_policy()
    _shake(policy, seed=1)
    next(policy.coldest())
    assert list(policy.coldest()) == list(policy.coldest())


def test_the_same_history_gives_the_same_order(make_policy: MakePolicy) -> None:
    one, two = make_policy(), make_policy()
    _shake(one, seed=2)
    _shake(two, seed=2)
    assert list(one.coldest()) == list(two.coldest())


def test_policies_share_nothing(make_policy: MakePolicy) -> None:
    one, two = make_policy(), make_policy()
    one.insert(3)
    assert list(two.coldest()) == []


def test_a_removed_expert_can_come_back(make_policy: MakePolicy) -> None:
    policy = make_policy()
    for expert in (1, 2):
        policy.insert(expert)
    policy.remove(1)
    policy.insert(1)
    assert sorted(policy.coldest()) == [1, 2]


def test_an_unused_newcomer_is_colder_than_one_in_constant_use(make_policy: MakePolicy) -> None:
    """Holds for FIFO, too, as long as the one in use came later."""
    policy = make_policy()
    policy.insert(1)
    policy.insert(2)
    for _ in range(50):
        policy.touch([2])
    assert list(policy.coldest()) == [1, 2]


def test_a_cache_large_enough_never_evicts(make_policy: MakePolicy) -> None:
    cache = ExpertCache([24], make_policy)
    chance = random.Random(3)
    for _ in range(200):
        experts = chance.sample(range(24), 4)
        for expert in cache.acquire(0, experts).load:
            cache.complete(0, expert)
        cache.release(0, experts)
        cache.check_integrity()
    assert cache.stats.evictions == 0
    assert cache.stats.misses == 24


@pytest.mark.parametrize("slots", [4, 7])
def test_a_step_never_loses_one_of_its_own(make_policy: MakePolicy, slots: int) -> None:
    cache = ExpertCache([slots], make_policy)
    chance = random.Random(4)
    for _ in range(300):
        experts = chance.sample(range(12), 4)
        resident = [expert for expert in experts if cache.is_resident(0, expert)]
        granted = cache.acquire(0, experts)
        assert granted.load == tuple(expert for expert in experts if expert not in resident)
        assert [cache.slot_of(0, expert) for expert in experts] == granted.slots
        for expert in granted.load:
            cache.complete(0, expert)
        cache.release(0, experts)
        cache.check_integrity()
    assert cache.stats.hits + cache.stats.misses == 300 * 4
    assert cache.stats.evictions == cache.stats.misses - slots


def test_what_is_passed_over_does_not_become_known(make_policy: MakePolicy) -> None:
    policy = make_policy()
    policy.insert(1)
    policy.pass_over([1, 2])
    assert list(policy.coldest()) == [1]
    policy.touch([1, 3], absent=[3])
    assert list(policy.coldest()) == [1]


def test_caches_share_nothing() -> None:
    """Policies of one cache may know of each other; those of two caches, such as two tiers, must not."""
    for name in POLICIES:
        one, two = ExpertCache([2], name), ExpertCache([2], name)
        history = [(0, 1), (2, 3), (0, 2)] * 30
        for experts in history:
            for expert in one.acquire(0, experts).load:
                one.complete(0, expert)
            one.release(0, experts)
        fresh = ExpertCache([2], name)
        for cache in (two, fresh):
            for expert in cache.acquire(0, [0, 1]).load:
                cache.complete(0, expert)
            cache.release(0, [0, 1])
        assert list(two._pools[0].policy.coldest()) == list(fresh._pools[0].policy.coldest())


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'mru' is not known; choose one of lru, lfu, adaptive, fifo"):
        policy_for("mru")
    with pytest.raises(OptionError, match="'mru'"):
        ExpertCache([2], "mru")
