"""check_integrity must notice: each test breaks one table behind the pool's back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_local.cache.lru import LRUPolicy
from moe_local.cache.slots import CacheStateError, SlotPool


@pytest.fixture
def pool() -> SlotPool:
    """Four slots: expert 7 resident and pinned, 8 loading for a prefetch, 9 resident, one free."""
    pool = SlotPool(4, LRUPolicy())
    for expert in (7, 8, 9):
        pool.place(expert)
    del pool.loading[7], pool.loading[9]
    pool.pins[7] = 2
    pool.unused.add(8)
    pool.check_integrity()
    return pool


def _leak_slot(pool: SlotPool) -> None:
    pool.free.clear()


def _double_free(pool: SlotPool) -> None:
    pool.free.append(pool.table[9])


def _wrong_free_slot(pool: SlotPool) -> None:
    pool.free[0] = pool.table[9]


def _swap_slots(pool: SlotPool) -> None:
    pool.table[7], pool.table[9] = pool.table[9], pool.table[7]


def _forget_reverse(pool: SlotPool) -> None:
    pool.expert_in[pool.table[9]] = None


def _load_without_slot(pool: SlotPool) -> None:
    pool.loading[5] = None


def _pin_absent(pool: SlotPool) -> None:
    pool.pins[5] = 1


def _pin_zero_times(pool: SlotPool) -> None:
    pool.pins[9] = 0


def _pin_negative(pool: SlotPool) -> None:
    pool.pins[7] = -1


def _mark_absent(pool: SlotPool) -> None:
    pool.unused.add(5)


def _policy_forgets(pool: SlotPool) -> None:
    pool.policy.remove(9)


def _policy_invents(pool: SlotPool) -> None:
    pool.policy.insert(5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_leak_slot, "are not the 4 slots"),
        (_double_free, "are not the 4 slots"),
        (_wrong_free_slot, "are not the empty ones"),
        (_swap_slots, "disagree"),
        (_forget_reverse, "disagree"),
        (_load_without_slot, "loading"),
        (_pin_absent, "pins"),
        (_pin_zero_times, "pins"),
        (_pin_negative, "pins"),
        (_mark_absent, "prefetched"),
        (_policy_forgets, "the policy knows 2"),
        (_policy_invents, "the policy knows 4"),
    ],
)
def test_damage_is_noticed(pool: SlotPool, damage: Callable[[SlotPool], None], message: str) -> None:
    damage(pool)
    with pytest.raises(CacheStateError, match=message):
        pool.check_integrity()


def test_removal_clears_every_trace(pool: SlotPool) -> None:
    for expert in (7, 8, 9):
        pool.remove(expert)
        pool.check_integrity()
    assert sorted(pool.free) == [0, 1, 2, 3]
    assert not pool.pins
    assert not pool.unused


def test_victims_are_resident_unpinned_and_not_kept(pool: SlotPool) -> None:
    assert pool.victims((), [1, 2, 3, 4]) == [9]
    assert pool.victims({9}, [1, 2, 3, 4]) == []
    assert pool.victims((), [1]) == []
    assert pool.victims({9}, [1, 2, 3, 4], pinned=True) == [7]


def test_lacking_counts_free_slots_and_victims(pool: SlotPool) -> None:
    assert pool.lacking((), absent=[1, 2]) == 0
    assert pool.lacking((), absent=[1, 2, 3, 4]) == 2
    assert pool.lacking({9}, absent=[1, 2, 3, 4]) == 3
