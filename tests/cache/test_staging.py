"""Experts that pass through the ring: counted like others, known to no policy, gone with their last pin."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.keys import ExpertKey
from moe_local.cache.slots import CacheStateError


@pytest.fixture
def cache() -> ExpertCache:
    """Two layers of two slots, a ring of two; experts 0 and 1 of layer 0 resident, 0 the colder one."""
    cache = ExpertCache([2, 2], sizes=lambda layer, expert: 10 + expert, staging=2)
    for expert in cache.acquire(0, [0, 1]).load:
        cache.complete(0, expert)
    cache.release(0, [0, 1])
    return cache


def coldest(cache: ExpertCache, layer: int = 0) -> list[int]:
    return list(cache._pools[layer].policy.coldest())


def test_a_step_that_passes_changes_nobody(cache: ExpertCache) -> None:
    held = cache.staging.hold(0, [5, 1, 6])
    assert (held.ready, held.joined, held.absent) == ([1], [], [5, 6])
    slots = [cache.staging.stage(0, expert) for expert in held.absent]
    assert slots == [-1, -2]
    assert cache.staging.stage(1, 3) == 0  # layer 1 has empty slots of its own
    assert cache.staging.used == 2
    cache.check_integrity()
    for expert in (5, 6):
        cache.complete(0, expert)
        assert cache.is_resident(0, expert)
        assert cache.residents(0) == (0, 1)
        cache.release(0, [expert])
        assert cache.slot_of(0, expert) is None
        cache.check_integrity()
    cache.release(0, [1])
    assert coldest(cache) == [0, 1]
    assert (cache.stats.hits_by_layer[0], cache.stats.misses_by_layer[0]) == (1, 4)  # 0 and 1 at first
    assert cache.stats.evictions == 0


def test_no_room(cache: ExpertCache) -> None:
    assert cache.staging.stage(0, 5) is not None
    assert cache.staging.stage(0, 6) is not None
    assert cache.staging.stage(0, 7) is None
    with pytest.raises(CacheStateError, match="to stage is in slot"):
        cache.staging.stage(0, 5)
    cache.check_integrity()


def test_read_ahead_and_needed(cache: ExpertCache) -> None:
    for expert in (5, 6):
        cache.staging.stage(0, expert, ahead=True)
    cache.complete(0, 5)
    cache.check_integrity()
    held = cache.staging.hold(0, [5, 6, 0])
    assert (held.ready, held.joined, held.absent) == ([5, 0], [6], [])
    prefetch = cache.stats.prefetch
    assert (prefetch.issued, prefetch.used, prefetch.late, prefetch.wasted_bytes) == (2, 1, 1, 0)
    cache.complete(0, 6)
    cache.release(0, [5, 6, 0])
    assert cache.staging.used == 0


def test_read_ahead_for_nothing(cache: ExpertCache) -> None:
    for expert in (5, 6):
        cache.staging.stage(0, expert, ahead=True)
    cache.complete(0, 5)
    assert cache.staging.clear(0, [5]) == [ExpertKey(0, 6)]
    cache.check_integrity()
    assert cache.slot_of(0, 5) is not None
    assert cache.staging.clear(1, [5]) == [ExpertKey(0, 6)]  # 5 of another layer
    assert cache.slot_of(0, 5) is None
    assert cache.stats.prefetch_wasted_bytes == 15
    cache.complete(0, 6)  # its load could not be stopped
    assert cache.stats.prefetch_wasted_bytes == 31
    assert cache.staging.used == 0
    cache.check_integrity()


def test_given_up_and_needed_again(cache: ExpertCache) -> None:
    cache.staging.stage(0, 5, ahead=True)
    cache.staging.clear(0, [])
    assert cache.acquire(0, [5, 1]).joined == (5,)
    cache.check_integrity()
    cache.complete(0, 5)
    assert cache.is_resident(0, 5)
    assert cache.acquire(0, [1, 5]).slots == [cache.slot_of(0, 1), -1]
    cache.release(0, [1, 5])
    cache.release(0, [1, 5])
    assert cache.slot_of(0, 5) is None
    assert coldest(cache) == [0, 1]
    cache.check_integrity()


def test_released_while_it_loads(cache: ExpertCache) -> None:
    for expert in (5, 6):
        cache.staging.stage(0, expert)
    cache.release(0, [5, 6])
    cache.check_integrity()
    cache.abandon(0, 5, 4)
    cache.complete(0, 6)
    assert cache.staging.used == 0
    assert cache.stats.prefetch_wasted_bytes == 0
    cache.check_integrity()


def test_a_staged_expert_moves_in(cache: ExpertCache) -> None:
    cache.staging.stage(0, 5)
    cache.complete(0, 5)
    assert cache.staging.next_victims(0, [1], [3, 4]) == [0]
    assert cache.staging.admit(0, 5, [1]) == 0
    cache.check_integrity()
    assert (coldest(cache), cache.staging.used, cache.pins(0, 5)) == ([1, 5], 0, 1)
    cache.release(0, [5])
    assert cache.residents(0) == (1, 5)
    cache.staging.touch(0, [5, 7, 1])
    assert coldest(cache) == [5, 1]
    cache.staging.stage(0, 6)
    with pytest.raises(CacheStateError, match="not staged and resident"):
        cache.staging.admit(0, 6, [])
    cache.complete(0, 6)
    assert cache.staging.admit(0, 6, [1, 5]) is None
    with pytest.raises(CacheStateError, match="to pin is absent"):
        cache.staging.pin(0, 4)


def _leak(cache: ExpertCache) -> None:
    cache.staging._free.clear()


def _forget(cache: ExpertCache) -> None:
    cache.staging._keys.clear()


def _for_nobody(cache: ExpertCache) -> None:
    del cache._pools[0].pins[5]


def _doom_a_needed_one(cache: ExpertCache) -> None:
    cache.staging._doomed.add(ExpertKey(0, 5))


def _doom_an_absent_one(cache: ExpertCache) -> None:
    cache.staging._doomed.add(ExpertKey(1, 5))


def _unmark(cache: ExpertCache) -> None:
    cache._pools[0].staged.clear()


@pytest.mark.parametrize(
    "damage", [_leak, _forget, _for_nobody, _doom_a_needed_one, _doom_an_absent_one, _unmark]
)
def test_integrity_notices(cache: ExpertCache, damage: Callable[[ExpertCache], None]) -> None:
    cache.staging.stage(0, 5)
    cache.check_integrity()
    damage(cache)
    with pytest.raises(CacheStateError):
        cache.check_integrity()
