from __future__ import annotations

import pytest

from moe_local.cache.lfu import HALF_LIFE_USES, LFUPolicy


def _policy(*experts: int) -> LFUPolicy:
    policy = LFUPolicy()
    for expert in experts:
        policy.insert(expert)
    return policy


def test_the_least_used_goes_first() -> None:
    policy = _policy(1, 2, 3)
    policy.touch([1])
    policy.touch([1, 3])
    assert list(policy.coldest()) == [2, 3, 1]


def test_among_equals_the_longest_unused_goes_first() -> None:
    policy = _policy(3, 1, 2)
    for expert in (3, 1, 2):
        policy.touch([expert])
    assert list(policy.coldest()) == [3, 1, 2]


def test_within_a_step_the_routers_first_choices_count_more() -> None:
    policy = _policy(1, 2, 3)
    policy.touch([3, 1, 2])
    assert list(policy.coldest()) == [2, 1, 3]
    policy.remove(1)
    policy.touch([2, 1], absent=[1])
    policy.insert(1)
    assert policy.uses[2] > policy.uses[3]
    assert policy.uses[1] < policy.uses[2]


def test_to_be_prefetched_is_no_use_and_to_be_passed_over_is_one() -> None:
    policy = _policy(1, 2)
    policy.touch([1])
    policy.pass_over([3, 2, 3])
    policy.insert(4)
    policy.insert(3)
    assert [policy.uses[expert] == 0 for expert in (1, 2, 3, 4)] == [False, False, False, True]
    assert list(policy.coldest()) == [4, 2, 1, 3]


def test_counts_outlive_eviction() -> None:
    policy = _policy(1, 2)
    policy.touch([1])
    policy.touch([1])
    policy.remove(1)
    policy.touch([2])
    policy.insert(1)
    assert list(policy.coldest()) == [2, 1]


def test_uses_fade_so_that_a_new_topic_wins() -> None:
    policy = _policy(1, 2)
    for _ in range(4 * HALF_LIFE_USES):
        policy.touch([1])
    assert list(policy.coldest()) == [2, 1]
    uses = 0
    while next(policy.coldest()) == 2:
        policy.touch([2])
        uses += 1
    # In HALF_LIFE_USES uses the lead of expert 1 halves, and expert 2 gets as much as expert 1 has left.
    assert uses == pytest.approx(HALF_LIFE_USES, rel=0.1)


def test_a_long_life_keeps_the_numbers_finite_and_the_order() -> None:
    policy = _policy(*range(32))
    steps = 1100 * HALF_LIFE_USES // 32
    for _ in range(steps):
        policy.touch(range(32))
    # Unscaled, the last use would weigh 2^1100, which no float holds.
    assert max(policy.uses.values()) < float("inf")
    assert list(policy.coldest()) == list(range(31, -1, -1))
    for _ in range(10):
        policy.touch([7])
    assert list(policy.coldest())[-1] == 7
