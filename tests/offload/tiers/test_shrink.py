"""A device's tier gives way while it is in use: right bytes, right tables, memory that really comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_local.cache.keys import ExpertKey
from moe_local.offload.tiers import device_arena
from moe_local.offload.tiers.shrink import shrink
from moe_local.offload.tiers.transfer import DEMAND

Make = Callable[..., Any]
MODES = ("ram", "ram+disk")
EVERYTHING = 1 << 40


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_arena, "SEGMENT_BYTES", 1)


def slots(rig: Any) -> list[int]:
    return [rig.tier.cache.slots(layer) for layer in range(rig.num_layers)]


def tightened(rig: Any, nbytes: int, device: Any = None) -> int:
    """Shrink, and see that just that came back."""
    device = device or rig.devices[0]
    before = device.allocated
    freed = shrink(rig.tier, rig.arena, nbytes, device)
    assert before - device.allocated == freed
    rig.store.check_integrity()
    return freed


@pytest.mark.parametrize("mode", MODES)
def test_all_but_the_least_comes_back_and_the_rest_serves_on(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=6, least=2)
    for layer in range(3):
        rig.step(layer, [0, 1, 2, 3, 4, 5])
    stride = rig.arena.strides[0]
    freed = tightened(rig, 1)  # a slot of the last layer, whole
    assert freed == rig.arena.strides[2]
    assert slots(rig) == [6, 6, 5]
    assert rig.devices[0].trims == 1
    freed = tightened(rig, stride + 1)
    assert slots(rig) == [5, 5, 5]
    evicted = rig.store.snapshot().evictions
    assert evicted == 3
    tightened(rig, EVERYTHING)
    assert slots(rig) == [2, 2, 2]
    assert rig.store.snapshot().evictions == 12
    assert tightened(rig, EVERYTHING) == 0
    assert rig.devices[0].allocated == rig.arena.nbytes == 2 * sum(rig.arena.strides)
    for layer in range(3):
        assert sorted(rig.tier.cache.residents(layer)) == [0, 1]
        rig.step(layer, [7, 0, 3, 5])  # in waves
    rig.settle()


def test_nothing_comes_back_below_the_least(make_rig: Make) -> None:
    rig = make_rig("ram", slots=3, least=3)
    assert tightened(rig, EVERYTHING) == 0
    assert rig.devices[0].trims == 0


def test_a_leased_slot_and_those_below_it_stay(make_rig: Make) -> None:
    rig = make_rig("ram", slots=4, least=1)
    for layer in range(3):
        rig.step(layer, [0, 1, 2, 3])
    leased = rig.store.serve(1, [2])  # in slot 2
    group = next(leased)
    freed = shrink(rig.tier, rig.arena, EVERYTHING, rig.devices[0])
    assert freed == sum(rig.arena.strides) + rig.arena.strides[2]
    assert slots(rig) == [3, 3, 2]
    rig.check_lease(1, group[0])
    leased.close()
    del group
    rig.check()
    tightened(rig, EVERYTHING)
    assert slots(rig) == [1, 1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_loads_into_slots_that_go_are_cancelled(make_rig: Make, make_device: Make, mode: str) -> None:
    rig = make_rig(mode, slots=5, least=1, device=make_device(luck=0.0, lazy=True))
    rig.store.prefetch(0, [0, 1, 2, 3, 4], distance=1, budget_bytes=1 << 20)
    rig.step(1, [3, 4])
    tightened(rig, EVERYTHING)
    assert slots(rig) == [1, 1, 1]
    rig.devices[0].synchronize()
    rig.settle()
    rig.step(0, [4])


def test_a_read_from_disk_that_is_under_way_is_no_obstacle(make_rig: Make, read_gate: Any) -> None:
    """The device's slot waits for RAM, which reads: the load ends at once, the read when it likes."""
    rig = make_rig("ram+disk", slots=3, least=1, ram_slots=3)
    read_gate.shut()
    rig.store.prefetch(2, [5, 6, 7], distance=1, budget_bytes=1 << 20)
    read_gate.wait_for(1)
    tightened(rig, EVERYTHING)
    assert slots(rig) == [1, 1, 1]
    read_gate.open()
    rig.settle()
    rig.step(2, [5])


def test_copies_and_kernels_that_have_not_run_yet_are_waited_for(make_rig: Make, make_device: Make) -> None:
    """A claimed copy still writes, and a kernel still reads, when the lease has long ended."""
    device = make_device(luck=0.0, lazy=True)
    rig = make_rig("ram", slots=4, least=1, device=device)
    rig.step(0, [0, 1, 2, 3])
    assert device.copying
    tightened(rig, EVERYTHING)
    assert not device.faults
    assert slots(rig) == [1, 1, 1]
    rig.settle()


def test_resident_slots_are_counted_as_evicted_and_come_again_on_demand(make_rig: Make) -> None:
    rig = make_rig("ram", slots=8, least=2)
    rig.tier.preload()
    rig.settle()
    tightened(rig, EVERYTHING)
    for layer in range(3):
        rig.step(layer, [1, 6])
    stats = rig.store.snapshot()
    assert (stats.hits, stats.misses, stats.evictions) == (3, 3, 3 * 6 + 3)


def test_only_the_card_that_is_short_gives_way(make_rig: Make, make_device: Make) -> None:
    first, second = make_device(1), make_device(2)
    rig = make_rig("ram", slots=5, least=2, device=[first, second, second])
    for layer in range(3):
        rig.step(layer, [0, 1, 2, 3, 4])
    tightened(rig, EVERYTHING, second)
    assert slots(rig) == [5, 2, 2]
    assert (first.trims, second.trims) == (0, 1)
    for layer in range(3):
        rig.step(layer, [5, 0, 3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lazy", [False, True])
@settings(
    max_examples=12,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 10**6))
def test_any_sequence_of_events_and_shrinks(
    make_rig: Make, make_device: Make, any_scheduler: Make, mode: str, lazy: bool, seed: int
) -> None:
    """Needs, prompts, prefetches, leases over several steps and shrinks, in any order, on one card or two."""
    rng = random.Random(seed)
    two = [make_device(seed, lazy=lazy), make_device(seed + 1, lazy=lazy)]
    cards = [two[0], two[rng.randrange(2)], two[1]]
    device = cards if seed % 2 else two[0]
    scheduler = any_scheduler(seed) if seed % 3 == 0 else None
    slots_below = rng.choice((2, 4))
    rig = make_rig(
        mode,
        slots=rng.randint(3, 7),
        ram_slots=slots_below,
        least=2,
        device=device,
        scheduler=scheduler,
        sized=seed % 5 < 2,
        staging=rng.choice((0, 2, 3)),
    )
    held: list[ExpertKey] = []
    for _ in range(60):
        layer, expert = rng.randrange(3), rng.randrange(8)
        what = rng.random()
        if what < 0.1 and not held and rig.store.prefill is not None:
            rig.store.prefill.begin(1, rng.choice((40, 3000)))
            needed = rng.sample(range(8), rng.randint(1, 8))
            rig.step(layer, needed, None, needed[: rng.randrange(3)])
        elif what < 0.35 and not held:
            rig.step(layer, rng.sample(range(8), rng.randint(1, 5)))
        elif what < 0.45 and len(held) < 2 and not rig.tier.cache.shortage(layer, [expert]):
            acquired = rig.tier.cache.acquire(layer, [expert])
            key = ExpertKey(layer, expert)
            if acquired.load:
                rig.tier.bring(key, acquired.slots[0], DEMAND)
            elif acquired.joined:
                rig.tier.promote(key)
            held.append(key)
        elif what < 0.65:
            rig.store.prefetch(layer, rng.sample(range(8), 3), distance=1, budget_bytes=60_000)
        elif what < 0.75 and held:
            finish(rig, held.pop())
        elif what < 0.85:
            card = rng.choice(rig.devices)
            before = slots(rig)
            tightened(rig, rng.choice((1, 9000, 40_000)), card)
            for at, (was, now) in enumerate(zip(before, slots(rig), strict=True)):
                assert was == now or rig.device_of(at) is card
                assert now >= 2
        elif what < 0.88 and not held:
            rig.store.empty()
        else:
            rig.tier.poll()
        rig.store.check_integrity()
    while held:
        finish(rig, held.pop())
    for card in rig.devices:
        tightened(rig, EVERYTHING, card)
    assert slots(rig) == [2, 2, 2]
    rig.settle()
    rig.close()


def finish(rig: Any, key: ExpertKey) -> None:
    """Wait for a leased expert, look at its bytes, give it back."""
    for _ in range(10_000):
        if rig.tier.claim(key)[0]:
            break
        rig.tier.source.wait(0.1)
        rig.tier.poll()
    slot = rig.tier.cache.slot_of(*key)
    buffer = rig.tier.arena.buffer(key.layer, slot)[: rig.size(*key)]
    want = rig.content[key]

    def kernel(found: Any) -> None:
        assert found.numpy().tobytes() == want

    rig.device_of(key.layer).launch(buffer, kernel)
    rig.copies.read_by(key.layer, [slot])
    rig.tier.cache.release(key.layer, [key.expert])
