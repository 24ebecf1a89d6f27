"""The optimum against all that could have been done, tried out."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest

from moe_local.cache.belady import BeladyPolicy, hits_with_bypass
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.policies import POLICIES

Steps = list[tuple[int, ...]]


def _hits(steps: Steps, slots: int, policy: str = "belady") -> int:
    cache = ExpertCache([slots], (lambda: BeladyPolicy(steps)) if policy == "belady" else policy)
    for experts in steps:
        for expert in cache.acquire(0, experts).load:
            cache.complete(0, expert)
        cache.release(0, experts)
        cache.check_integrity()
    return cache.stats.hits


def _most_hits(steps: Steps, slots: int, bypass: bool) -> int:
    """The best of everything a cache could keep after each step."""

    @cache
    def best(number: int, kept: frozenset[int]) -> int:
        if number == len(steps):
            return 0
        needed = set(steps[number])
        held = kept | needed
        must = frozenset() if bypass else frozenset(needed)
        spare = held - must
        after = (
            must | frozenset(choice)
            for count in range(min(slots - len(must), len(spare)) + 1)
            for choice in itertools.combinations(sorted(spare), count)
        )
        return len(kept & needed) + max(best(number + 1, choice) for choice in after)

    return best(0, frozenset())


def _random_steps(seed: int, count: int = 9, experts: int = 6) -> Steps:
    chance = random.Random(seed)
    return [tuple(chance.sample(range(experts), chance.randint(1, 3))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_nothing_beats_it(seed: int) -> None:
    steps = _random_steps(seed)
    for slots in (3, 4):
        assert _hits(steps, slots) == _most_hits(steps, slots, bypass=False)
        assert sum(hits_with_bypass(steps, slots)) == _most_hits(steps, slots, bypass=True)


def test_to_keep_nothing_can_be_better() -> None:
    steps: Steps = [(0, 1), (2,), (0, 1), (3,), (0, 1)]
    assert _hits(steps, 2) == 2
    assert hits_with_bypass(steps, 2) == [0, 0, 2, 0, 2]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_policy_beats_it(name: str) -> None:
    for seed in range(20):
        steps = _random_steps(seed, count=60, experts=9)
        for slots in (3, 5, 8):
            assert _hits(steps, slots, name) <= _hits(steps, slots) <= sum(hits_with_bypass(steps, slots))


def test_what_was_not_foreseen_is_refused() -> None:
    policy = BeladyPolicy([(0, 1)])
    with pytest.raises(ValueError, match=r"step 0 needs \[0, 2\], which was not foreseen"):
        policy.touch([0, 2], [0, 2])
    policy = BeladyPolicy([(0, 1)])
    policy.touch([0, 1], [0, 1])
    with pytest.raises(ValueError, match="step 1 needs"):
        policy.touch([0, 1], [0, 1])
    with pytest.raises(ValueError, match="passed over"):
        policy.pass_over([3])
