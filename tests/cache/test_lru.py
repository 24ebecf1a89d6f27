from __future__ import annotations

from moe_local.cache.lru import LRUPolicy


def test_the_longest_unused_goes_first() -> None:
    policy = LRUPolicy()
    for expert in (5, 3, 8):
        policy.insert(expert)
    assert list(policy.coldest()) == [5, 3, 8]
    policy.touch([5])
    assert list(policy.coldest()) == [3, 8, 5]


def test_within_a_step_the_first_choice_counts_as_used_first() -> None:
    policy = LRUPolicy()
    for expert in (1, 2, 3, 4):
        policy.insert(expert)
    policy.touch([3, 1])
    assert list(policy.coldest()) == [2, 4, 3, 1]


def test_coming_back_counts_as_a_use() -> None:
    policy = LRUPolicy()
    policy.insert(1)
    policy.insert(2)
    policy.remove(1)
    policy.insert(1)
    assert list(policy.coldest()) == [2, 1]
