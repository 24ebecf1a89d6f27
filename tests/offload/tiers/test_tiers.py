"""Tiers over one another: joins, promotion, cancellation, failures, and copies that end when they like."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from moe_local.cache.errors import TransferError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.tiers.transfer import DEMAND

Make = Callable[..., Any]


def need(rig: Any, layer: int, expert: int) -> None:
    """What the store does for one expert, without waiting."""
    acquired = rig.tier.cache.acquire(layer, [expert])
    if acquired.load:
        rig.tier.bring(ExpertKey(layer, expert), acquired.slots[0], DEMAND)
    elif acquired.joined:
        rig.tier.promote(ExpertKey(layer, expert))


def await_expert(rig: Any, layer: int, expert: int) -> None:
    """Until kernels may read it."""
    for _ in range(10_000):
        if rig.tier.claim(ExpertKey(layer, expert))[0]:
            return
        rig.tier.source.wait(0.1)
        rig.tier.poll()
        rig.tier.check_integrity()
    raise AssertionError("never came")


def content(rig: Any, layer: int, expert: int) -> bytes:
    slot = rig.tier.cache.slot_of(layer, expert)
    return bytes(rig.tier.arena.buffer(layer, slot)[: rig.size(layer, expert)].numpy())


@pytest.mark.parametrize("mode", ["disk", "ram", "ram+disk"])
def test_preload_fills_every_slot_and_counts_nothing(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=5, ram_slots=8)
    seen: list[tuple[int, int]] = []
    rig.tier.preload(lambda done, total: seen.append((done, total)))
    rig.settle()
    assert seen[-1] == (15, 15)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for layer in range(3):
        assert sorted(rig.tier.cache.residents(layer)) == [0, 1, 2, 3, 4]
        assert all(content(rig, layer, e) == rig.content[ExpertKey(layer, e)] for e in range(5))
    counts = rig.store.snapshot()
    assert (counts.hits, counts.misses, counts.prefetch.issued, counts.evictions) == (0, 0, 0, 0)


def test_preload_raises_the_first_error(make_rig: Make, read_gate: Any) -> None:
    rig = make_rig("disk", slots=8)
    read_gate.errors[rig.locations[ExpertKey(1, 4)].offset] = OSError(errno.EIO, "Input/output error")
    with pytest.raises(TransferError, match="expert 4 of MoE layer 1"):
        rig.tier.preload()
    rig.settle()


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_joining_a_load_under_way_reads_once(make_rig: Make, read_gate: Any, mode: str) -> None:
    rig = make_rig(mode)
    read_gate.shut()
    rig.store.prefetch(0, [5], distance=1, budget_bytes=1 << 20)
    read_gate.wait_for(1)
    need(rig, 0, 5)
    need(rig, 0, 5)  # a second lease of the same expert
    read_gate.open()
    await_expert(rig, 0, 5)
    assert content(rig, 0, 5) == rig.content[ExpertKey(0, 5)]
    assert rig.disk.starts == {ExpertKey(0, 5): 1}
    rig.tier.cache.release(0, [5])
    rig.tier.cache.release(0, [5])
    rig.settle()


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_demand_overtakes_prefetch_through_all_tiers(make_rig: Make, read_gate: Any, mode: str) -> None:
    rig = make_rig(mode, threads=1, pages=1, piece_bytes=4096)
    read_gate.shut()
    rig.store.prefetch(1, [0, 1, 2], distance=1, budget_bytes=1 << 20)
    read_gate.wait_for(1)
    need(rig, 0, 7)  # absent: goes ahead
    need(rig, 1, 2)  # under way: is promoted
    read_gate.open()
    await_expert(rig, 0, 7)
    await_expert(rig, 1, 2)
    expert_at = {location.offset: key for key, location in rig.locations.items()}
    order = [expert_at[offset] for offset in read_gate.arrived]
    assert order[0] == ExpertKey(1, 0)  # was being read already
    assert set(order[1:3]) == {ExpertKey(0, 7), ExpertKey(1, 2)}
    rig.tier.cache.release(0, [7])
    rig.tier.cache.release(1, [2])
    rig.settle()
    assert set(rig.disk.starts.values()) == {1}


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_cancelled_load_frees_its_slots_once_its_reads_have_ended(
    make_rig: Make, read_gate: Any, mode: str
) -> None:
    rig = make_rig(mode, slots=1, ram_slots=1)
    read_gate.shut()
    rig.store.prefetch(0, [5], distance=1, budget_bytes=1 << 20)
    read_gate.wait_for(1)
    rig.tier.cancel(ExpertKey(0, 5))
    rig.tier.poll()
    assert rig.ram.cache.loading(0) == (5,)  # somebody still writes to that slot
    rig.check()
    read_gate.open()
    rig.settle()
    assert rig.ram.cache.slot_of(0, 5) is None
    assert rig.tier.cache.free(0) == 1
    rig.step(0, [3])


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
@pytest.mark.parametrize("again", ["demand", "prefetch, then demand"])
def test_a_load_needed_again_before_its_cancellation_ended_is_restarted(
    make_rig: Make, read_gate: Any, mode: str, again: str
) -> None:
    rig = make_rig(mode)
    read_gate.shut()
    rig.store.prefetch(0, [5], distance=1, budget_bytes=1 << 20)
    read_gate.wait_for(1)
    rig.tier.cancel(ExpertKey(0, 5))
    rig.tier.poll()
    if again != "demand":
        rig.store.prefetch(0, [5], distance=1, budget_bytes=1 << 20)
    need(rig, 0, 5)
    rig.tier.poll()
    rig.tier.check_integrity()
    read_gate.open()
    await_expert(rig, 0, 5)
    assert content(rig, 0, 5) == rig.content[ExpertKey(0, 5)]
    rig.tier.cache.release(0, [5])
    rig.settle()


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_restarted_load_is_as_urgent_as_whoever_needs_it(
    make_rig: Make, read_gate: Any, mode: str, seen: bool
) -> None:
    rig = make_rig(mode, threads=1, pages=1, piece_bytes=4096)
    read_gate.shut()
    rig.store.prefetch(0, [5], distance=1, budget_bytes=1 << 20)
    read_gate.wait_for(1)
    rig.tier.cancel(ExpertKey(0, 5))
    if seen:
        rig.tier.poll()
    rig.store.prefetch(1, [0, 1, 2], distance=1, budget_bytes=1 << 20)
    need(rig, 0, 5)
    read_gate.let(1)
    read_gate.wait_for(2)  # the next in the queue, before the cancelled load has been seen to end
    rig.tier.poll()
    read_gate.open()
    await_expert(rig, 0, 5)
    rig.tier.cache.release(0, [5])
    rig.settle()
    at = {location.offset: key for key, location in rig.locations.items()}
    order = [at[offset] for offset in read_gate.arrived]
    assert order[0] == order[2] == ExpertKey(0, 5)


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_load_that_failed_before_it_was_needed_is_tried_once_more(
    make_rig: Make, read_gate: Any, mode: str
) -> None:
    rig = make_rig(mode, threads=1, pages=1, piece_bytes=4096)
    offset = rig.locations[ExpertKey(0, 5)].offset
    for mended in (True, False):
        read_gate.errors[offset] = OSError(errno.EIO, os.strerror(errno.EIO))
        read_gate.shut()
        reads = len(read_gate.arrived)
        rig.store.prefetch(0, [5], distance=1, budget_bytes=1 << 20)
        read_gate.wait_for(reads + 1)
        need(rig, 0, 5)
        read_gate.let(1)
        while not rig.disk.finished:
            rig.disk.wait(0.1)
        if mended:
            read_gate.errors.clear()
        read_gate.open()
        if mended:
            await_expert(rig, 0, 5)
            assert content(rig, 0, 5) == rig.content[ExpertKey(0, 5)]
            rig.tier.cache.release(0, [5])
            for expert in (0, 1, 2, 3, 4, 6, 7):  # so that the next round finds it absent again, below, too
                rig.step(0, [expert])
            assert rig.ram.cache.slot_of(0, 5) is None
        else:
            with pytest.raises(TransferError, match="expert 5 of MoE layer 0"):
                await_expert(rig, 0, 5)
        assert len(read_gate.arrived) >= reads + 2
        rig.settle()


def test_promotion_of_a_load_without_a_slot_below_counts_once_it_has_one(
    make_rig: Make, read_gate: Any
) -> None:
    rig = make_rig("ram+disk", slots=3, ram_slots=1, threads=1, pages=1, piece_bytes=4096)
    read_gate.shut()
    rig.store.prefetch(0, [0, 1, 2], distance=3, budget_bytes=1 << 20)  # the one slot below goes to 0
    read_gate.wait_for(1)
    need(rig, 0, 2)
    read_gate.open()
    await_expert(rig, 0, 2)
    at = {location.offset: key.expert for key, location in rig.locations.items()}
    assert [at[offset] for offset in read_gate.arrived][:2] == [0, 2]
    rig.tier.cache.release(0, [2])
    rig.settle()


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_failed_prefetch_raises_nothing_and_frees_all_its_slots(
    make_rig: Make, read_gate: Any, mode: str
) -> None:
    rig = make_rig(mode)
    read_gate.errors[rig.locations[ExpertKey(0, 5)].offset] = OSError(errno.EIO, os.strerror(errno.EIO))
    rig.store.prefetch(0, [5], distance=1, budget_bytes=1 << 20)
    rig.settle()
    assert rig.tier.cache.slot_of(0, 5) is None
    assert rig.ram.cache.slot_of(0, 5) is None
    read_gate.errors.clear()
    rig.step(0, [5, 6])


def test_a_copy_that_the_device_refuses_fails_its_load_only(make_rig: Make) -> None:
    rig = make_rig("ram")
    rig.device.fail_copies = 1
    need(rig, 0, 1)
    rig.tier.poll()
    with pytest.raises(TransferError, match="expert 1 of MoE layer 0 could not be copied: CUDA error"):
        rig.tier.claim(ExpertKey(0, 1))
    rig.settle()
    rig.step(0, [1, 2])


def test_claiming_an_issued_copy_makes_the_device_wait_not_the_host(
    make_rig: Make, make_device: Callable[..., Any]
) -> None:
    device = make_device(luck=0.0, lazy=True)  # nothing happens unless it is forced
    rig = make_rig("ram", device=device)
    need(rig, 0, 1)
    there, waited = rig.tier.claim(ExpertKey(0, 1))
    assert there
    assert waited is not None
    assert not rig.tier.loading
    slot = rig.tier.cache.slot_of(0, 1)
    seen: list[bytes] = []
    buffer = rig.tier.arena.buffer(0, slot)[: rig.size(0, 1)]
    device.launch(buffer, lambda b: seen.append(b.numpy().tobytes()))
    assert seen == []
    assert waited.seconds() == 0.001
    device.synchronize()
    assert seen == [rig.content[ExpertKey(0, 1)]]
    rig.copies.read_by(0, [slot])
    rig.tier.cache.release(0, [1])
    rig.settle()


def test_waiting_ends_where_a_copy_could_be_issued(make_rig: Make, make_device: Callable[..., Any]) -> None:
    device = make_device(luck=0.0, lazy=True)
    rig = make_rig("ram+disk", device=device)
    need(rig, 0, 1)
    while not rig.disk.finished:
        rig.disk.wait(0.1)
    rig.copies.wait(1.0)
    assert device.copying  # the host has not waited for its end
    assert rig.tier.claim(ExpertKey(0, 1))[0]
    rig.tier.cache.release(0, [1])
    device.synchronize()
    rig.settle()


def test_the_copy_into_a_slot_waits_for_the_kernels_that_read_it(
    make_rig: Make, make_device: Callable[..., Any]
) -> None:
    rig = make_rig("ram", slots=1, device=make_device(luck=0.0, lazy=True))
    for expert in (0, 1, 2, 1):
        rig.step(0, [expert])  # no kernel has run yet when the next copy is issued
    rig.device.synchronize()
    rig.check()


def test_experts_stay_pinned_below_until_their_copies_have_ended(
    make_rig: Make, make_device: Callable[..., Any]
) -> None:
    rig = make_rig("ram+disk", slots=4, ram_slots=2, device=make_device(luck=0.0, lazy=True))
    rig.step(0, [0, 1])
    assert rig.ram.cache.pins(0, 0) == rig.ram.cache.pins(0, 1) == 1
    assert rig.ram.cache.shortage(0, [2]) == 1
    rig.step(0, [2, 3])  # has to wait for one of the copies
    rig.device.synchronize()
    rig.settle()


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_close_with_loads_under_way_leaves_consistent_tables(
    make_rig: Make, read_gate: Any, mode: str
) -> None:
    rig = make_rig(mode)
    rig.step(1, [4])
    read_gate.shut()
    reads = len(read_gate.arrived)
    rig.store.prefetch(0, [5, 6], distance=1, budget_bytes=1 << 20)
    need(rig, 0, 7)
    read_gate.wait_for(reads + 1)
    read_gate.open()
    rig.store.close()
    rig.store.close()
    rig.store.check_integrity()
    for tier in {rig.tier, rig.ram}:
        assert not tier.loading
        assert all(tier.cache.loading(layer) == () for layer in range(3))
    with pytest.raises(RuntimeError, match="closed"):
        rig.disk.start(ExpertKey(0, 0), 0, DEMAND)


@pytest.mark.parametrize("mode", ["disk", "ram", "ram+disk"])
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_events_keeps_the_tables_right(
    make_rig: Make, make_device: Callable[..., Any], mode: str, seed: int
) -> None:
    """Needs, prefetches, cancellations and releases in any order, with a poll whenever chance wants it."""
    rng = random.Random(seed)
    rig = make_rig(mode, slots=3, ram_slots=2 if seed == 2 else 4, device_seed=seed)
    held: list[ExpertKey] = []
    for _ in range(300):
        layer, expert = rng.randrange(3), rng.randrange(8)
        key = ExpertKey(layer, expert)
        what = rng.random()
        if what < 0.3 and not rig.tier.cache.shortage(layer, [expert]):
            need(rig, *key)
            held.append(key)
        elif what < 0.5:
            rig.store.prefetch(
                layer, rng.sample(range(8), 2), distance=rng.randint(1, 3), budget_bytes=50_000
            )
        elif what < 0.6 and rig.tier.cache.loading(layer):
            rig.tier.cancel(ExpertKey(layer, rng.choice(rig.tier.cache.loading(layer))))
        elif what < 0.8 and held:
            key = held.pop(rng.randrange(len(held)))
            await_expert(rig, *key)
            assert content(rig, *key) == rig.content[key]
            rig.tier.cache.release(key.layer, [key.expert])
        else:
            rig.tier.poll()
        rig.store.check_integrity()
    for key in held:
        await_expert(rig, *key)
        rig.tier.cache.release(key.layer, [key.expert])
    rig.settle()
