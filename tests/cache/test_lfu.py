from __future__ import annotations

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
    policy = _policy(1, 2, 3)
    policy.touch([3, 1])
    policy.touch([2])
    assert list(policy.coldest()) == [3, 1, 2]


def test_counts_outlive_eviction() -> None:
    policy = _policy(1, 2)
    policy.touch([1])
    policy.touch([1])
    policy.remove(1)
    policy.touch([2])
    policy.insert(1)
    assert list(policy.coldest()) == [2, 1]


def test_counts_fade_so_that_a_new_topic_wins() -> None:
    policy = _policy(1, 2)
    for _ in range(HALF_LIFE_USES):
        policy.touch([1])
    assert list(policy.coldest()) == [2, 1]
    uses = 0
    while next(policy.coldest()) == 2:
        policy.touch([2])
        uses += 1
    # Without fading it would take as many uses as expert 1 had.
    assert HALF_LIFE_USES / 4 < uses < HALF_LIFE_USES * 3 / 4
