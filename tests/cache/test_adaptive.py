"""Frequency or recency: the shadows are what the caches would be, and neither choice is wrong for long."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from moe_local.cache.adaptive import AdaptivePolicy
from moe_local.cache.duel import Duel
from moe_local.cache.expert_cache import ExpertCache

Steps = list[Sequence[int]]


def _step(cache: ExpertCache, layer: int, experts: Sequence[int]) -> None:
    for expert in cache.acquire(layer, experts).load:
        cache.complete(layer, expert)
    cache.release(layer, experts)


LAYERS = 4


def _hit_rate(make: Callable[[int], Steps], slots: int, policy: str) -> float:
    """Of a cache whose layers need what `make(layer)` says."""
    cache = ExpertCache([slots] * LAYERS, policy)
    for token in zip(*map(make, range(LAYERS)), strict=True):
        for layer, experts in enumerate(token):
            _step(cache, layer, experts)
    rate = cache.stats.snapshot().hit_rate
    assert rate is not None
    return rate


class Listener(Duel):
    """Keeps what it is told and decides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, int, int, int]] = []

    def judge(self, needed: int, own: int, recency: int, frequency: int) -> None:
        self.heard.append((needed, own, recency, frequency))


@pytest.mark.parametrize("slots", [4, 7, 16])
def test_the_shadows_hit_what_caches_of_one_order_hit(slots: int) -> None:
    """Step by step, whatever the duel decides and whatever is prefetched in between."""
    chance = random.Random(slots)
    duel = Listener()
    mixed = ExpertCache([slots], lambda: AdaptivePolicy(duel))
    lru, lfu = ExpertCache([slots], "lru"), ExpertCache([slots], "lfu")
    compared = 0
    for number in range(400):
        duel.recency = number >= 20
        if number == 20:  # from here on its shadow goes its own way
            assert set(lfu.residents(0)) == set(mixed.residents(0))
        low = 10 * (number // 100)
        experts = chance.sample(range(low, low + 20), 4)
        before = lru.stats.hits, lfu.stats.hits, mixed.stats.hits
        for cache in (mixed, lru, lfu):
            _step(cache, 0, experts)
        needed, own, recent, frequent = duel.heard[-1]
        assert (needed, own) == (4, mixed.stats.hits - before[2])
        assert recent == lru.stats.hits - before[0]
        assert frequent == lfu.stats.hits - before[1]
        compared += own != frequent
        guess = chance.randrange(60)
        if number >= 20 and number % 3 == 0 and mixed.reserve(0, guess) is not None:
            mixed.complete(0, guess)
        mixed.check_integrity()
    assert compared or slots == 4


def test_a_hit_that_a_prefetch_made_is_no_merit_of_the_order() -> None:
    duel = Listener()
    cache = ExpertCache([4], lambda: AdaptivePolicy(duel))
    _step(cache, 0, [1, 2])
    cache.reserve(0, 3)
    cache.complete(0, 3)
    _step(cache, 0, [2, 3])
    _step(cache, 0, [2, 3])
    assert duel.heard == [(2, 0, 0, 0), (2, 2, 1, 1), (2, 2, 2, 2)]


def test_failed_loads_leave_the_shadows_in_order() -> None:
    """They leave a slot empty for a while, and the shadows have one less."""
    cache = ExpertCache([4], "adaptive")
    policy = cache._pools[0].policy
    assert isinstance(policy, AdaptivePolicy)
    chance = random.Random(2)
    for number in range(200):
        policy._duel.recency = number % 50 > 25
        experts = chance.sample(range(9), 2)
        for expert in cache.acquire(0, experts).load:
            if chance.random() < 0.3:
                cache.abandon(0, expert)
            else:
                cache.complete(0, expert)
        cache.release(0, [expert for expert in experts if cache.pins(0, expert)])
        cache.check_integrity()
        assert len(policy._recency) <= 6
        assert len(policy._frequency or ()) <= 6


def test_all_layers_follow_the_same_order_and_caches_decide_alone() -> None:
    one, two = AdaptivePolicy.family(), AdaptivePolicy.family()
    first, second, other = one(), one(), two()
    assert first._duel is second._duel
    assert first._duel is not other._duel


def test_an_emptied_cache_decides_anew() -> None:
    cache = ExpertCache([4, 4], "adaptive")
    before = cache._pools[0].policy
    cache.empty()
    first, second = (cache._pools[layer].policy for layer in (0, 1))
    assert isinstance(before, AdaptivePolicy)
    assert isinstance(first, AdaptivePolicy)
    assert isinstance(second, AdaptivePolicy)
    assert first._duel is second._duel is not before._duel
    assert first._duel._layers == 2


def test_a_duel_leaves_frequency_when_it_loses_and_takes_it_up_when_it_wins() -> None:
    duel = Duel()
    duel.join()
    assert not duel.recency
    for _ in range(40):
        duel.judge(4, own=3, recency=2, frequency=3)
    assert not duel.recency
    # However long it has led, two lost hits are enough.
    duel.judge(4, own=1, recency=3, frequency=1)
    assert duel.recency
    for _ in range(3):
        duel.judge(4, own=2, recency=2, frequency=2)
    assert duel.recency
    for _ in range(12):
        duel.judge(4, own=1, recency=1, frequency=3)
    assert not duel.recency


def test_one_layer_of_many_does_not_decide() -> None:
    duel = Duel()
    for _ in range(10):
        duel.join()
    duel.judge(4, own=0, recency=4, frequency=0)
    assert not duel.recency


def test_a_cache_in_debt_follows_recency_though_the_shadow_of_frequency_is_no_worse() -> None:
    duel = Duel()
    duel.join()
    for _ in range(100):
        duel.judge(4, own=1, recency=2, frequency=2)
        if duel.recency:
            break
    assert duel.recency


def _four_of(order: list[int], chance: random.Random) -> list[int]:
    """Different ones, the first of `order` twice as likely as the second, three times as the third ..."""
    weights = [1 / rank for rank in range(1, len(order) + 1)]
    chosen: dict[int, None] = {}
    while len(chosen) < 4:
        chosen[chance.choices(order, weights)[0]] = None
    return list(chosen)


def _zipf(seed: int, steps: int = 480) -> Steps:
    chance = random.Random(seed)
    order = chance.sample(range(64), 64)
    return [_four_of(order, chance) for _ in range(steps)]


def _topics(seed: int, width: int, length: int, steps: int = 480) -> Steps:
    """Every `length` steps other experts, `width` of them."""
    chance = random.Random(seed)
    made: Steps = []
    topic: list[int] = []
    for number in range(steps):
        if number % length == 0:
            topic = chance.sample(range(64), width)
        made.append(chance.sample(topic, 4))
    return made


def _cycle(seed: int, length: int, steps: int = 480) -> Steps:
    return [[(seed + 4 * number + place) % length for place in range(4)] for number in range(steps)]


def _poisoned(seed: int, steps: int = 480) -> Steps:
    """Four experts again and again, then others that need them gone."""
    made: Steps = []
    for number in range(steps):
        start = 4 + 16 * (number // 40 % 3)
        poison = number % 40 < 12
        others = [start + (seed + 4 * number + place) % 16 for place in range(4)]
        made.append([0, 1, 2, 3] if poison else others)
    return made


def _chance(seed: int, steps: int = 480) -> Steps:
    chance = random.Random(seed)
    return [chance.sample(range(64), 4) for _ in range(steps)]


def _stack(seed: int, steps: int = 480) -> Steps:
    """The more recently an expert was used, the likelier it is: what LRU is made for."""
    chance = random.Random(seed)
    order = chance.sample(range(64), 64)
    made: Steps = []
    for _ in range(steps):
        made.append(_four_of(order, chance))
        order = [*made[-1], *(expert for expert in order if expert not in made[-1])]
    return made


ROUTES: dict[str, Callable[[int], Steps]] = {
    "topics that fit": lambda seed: _topics(seed, 16, 24),
    "topics that do not": lambda seed: _topics(seed, 24, 24),
    "long topics": lambda seed: _topics(seed, 12, 80),
    "a cycle that just fits": lambda seed: _cycle(seed, 16),
    "a cycle that just does not": lambda seed: _cycle(seed, 20),
    "poisoned": _poisoned,
    "chance": _chance,
    "popularity": _zipf,
    "recency": _stack,
}


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("slots", [8, 16])
def test_never_worse_than_lru_by_more_than_half_a_point(name: str, slots: int) -> None:
    lru, adaptive = (_hit_rate(ROUTES[name], slots, policy) for policy in ("lru", "adaptive"))
    assert adaptive >= lru - 0.005


def test_the_first_change_of_topic_costs_less_than_a_miss_for_two_slots() -> None:
    """Where LRU is perfect but for the changes, on routes too short to make it up."""

    def make(seed: int) -> Steps:
        return _topics(seed, 16, 24, steps=96)

    lost = (_hit_rate(make, 16, "lru") - _hit_rate(make, 16, "adaptive")) * 96 * 4
    assert 0 < lost < 8


def test_frequency_alone_would_be_worse_by_far() -> None:
    """Or these routes would show nothing."""
    lru, lfu = (_hit_rate(ROUTES["topics that fit"], 16, policy) for policy in ("lru", "lfu"))
    assert lfu < lru - 0.05


def test_where_popularity_lasts_it_is_as_good_as_frequency() -> None:
    lru, lfu, adaptive = (_hit_rate(_zipf, 12, name) for name in ("lru", "lfu", "adaptive"))
    assert lfu > lru + 0.03
    assert adaptive > lru + 0.9 * (lfu - lru)
