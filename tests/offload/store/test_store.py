"""The store: right bytes whatever happens, counts as defined, no deadlock, nothing left over."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import TransferError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.store.uncounted import uncounted
from moe_local.offload.system.patience import PATIENCE_S, Patience
from moe_local.offload.tiers import transfer
from support.variants import others_slow

Make = Callable[..., Any]
MODES = ("disk", "ram", "ram+disk")
LAYERS, EXPERTS = 3, 8
BUDGET = 1 << 20


class ConsumerError(Exception):
    """Thrown in the code that uses the leases."""


class Faults:
    """Switches for what can go wrong while a layer is served."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interrupt = False
        self.reads = 0
        """So many of the next reads fail."""
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self.read)
        monkeypatch.setattr("moe_local.offload.store.store.check_interrupt", self.check)

    def read(self, file: int, buffers: list[memoryview], offset: int) -> int:
        if self.reads > 0:
            self.reads -= 1
            raise OSError(errno.EIO, "Input/output error")
        return self._preadv(file, buffers, offset)

    def check(self) -> None:
        if self.interrupt:
            self.interrupt = False
            raise KeyboardInterrupt


@pytest.fixture
def faults(make_rig: Make, monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def open_once_waited_for(rig: Any, gate: Any) -> None:
    """Open the gate when the disk has been waited for some 20 ms, however late that wait begins."""
    wait = rig.disk.wait

    def waits(seconds: float) -> None:
        time.sleep(0.02)
        rig.disk.wait = wait
        gate.open()
        wait(seconds)

    rig.disk.wait = waits


# Counts


class ObviousLRU:
    """What an LRU of `slots` slots a layer does with one layer's experts of one step."""

    def __init__(self, slots: int) -> None:
        self.slots, self.order = slots, OrderedDict[int, None]()
        self.hits = self.misses = 0

    def step(self, experts: list[int]) -> None:
        hits = [e for e in experts if e in self.order]
        misses = [e for e in experts if e not in self.order]
        self.hits, self.misses = self.hits + len(hits), self.misses + len(misses)
        for e in hits:
            self.order.move_to_end(e)
        for e in misses:
            if len(self.order) == self.slots:
                del self.order[next(o for o in self.order if o not in experts)]
            self.order[e] = None


def routes(steps: int, seed: int) -> Iterator[list[list[int]]]:
    """Top-2 choices a layer and step, of experts of unequal popularity that like to come again."""
    rng = random.Random(seed)
    last = [rng.sample(range(EXPERTS), 2) for _ in range(LAYERS)]
    for _ in range(steps):
        for layer in range(LAYERS):
            if rng.random() < 0.6:
                chosen = dict.fromkeys(
                    rng.choices(range(EXPERTS), [1 / (1 + e) for e in range(EXPERTS)], k=9)
                )
                last[layer] = list(chosen)[:2] if len(chosen) > 1 else last[layer]
        yield [list(layer) for layer in last]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_hits_and_misses_are_those_of_an_obvious_lru(make_rig: Make, mode: str, slots: int) -> None:
    rig = make_rig(mode, slots=slots)
    models = [ObviousLRU(slots) for _ in range(LAYERS)]
    for step in routes(150, seed=slots):
        for layer, experts in enumerate(step):
            rig.step(layer, experts)
            models[layer].step(experts)
            assert set(rig.tier.cache.residents(layer)) == set(models[layer].order)
    stats = rig.store.snapshot()
    assert stats.hits_by_layer == tuple(model.hits for model in models)
    assert stats.misses_by_layer == tuple(model.misses for model in models)
    assert stats.hits > 0
    assert stats.misses > 0
    assert stats.prefetch.issued == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_trial_changes_no_count(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode)
    rig.step(1, [4, 2])
    counted, tally = rig.store.snapshot(), rig.store.tally()
    with uncounted(rig.store):
        rig.store.prefetch(2, [1], distance=1, budget_bytes=BUDGET)
        rig.step(1, [3, 5])
        rig.settle()
        assert rig.store.snapshot() != counted
        assert mode == "ram" or rig.store.tally().bytes_disk > tally.bytes_disk
    assert rig.store.snapshot() == counted
    assert rig.store.tally() == tally


@pytest.mark.parametrize("mode", MODES)
def test_a_prefetch_that_arrived_in_time_is_a_hit(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode)
    rig.store.prefetch(1, [4, 5], distance=1, budget_bytes=BUDGET)
    rig.settle()
    rig.step(1, [4, 2])
    stats = rig.store.snapshot()
    assert (stats.hits, stats.misses) == (1, 1)
    assert (stats.prefetch.issued, stats.prefetch.used, stats.prefetch.late) == (2, 1, 0)
    rig.step(1, [4, 2])  # counted as used once only
    assert rig.store.snapshot().prefetch.used == 1


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_late_prefetch_is_a_miss_and_is_read_once(make_rig: Make, read_gate: Any, mode: str) -> None:
    rig = make_rig(mode)
    read_gate.shut()
    rig.store.prefetch(1, [4], distance=1, budget_bytes=BUDGET)
    read_gate.wait_for(1)
    open_once_waited_for(rig, read_gate)
    rig.step(1, [4])
    stats = rig.store.snapshot()
    assert (stats.hits, stats.misses) == (0, 1)
    assert (stats.prefetch.issued, stats.prefetch.used, stats.prefetch.late) == (1, 0, 1)
    assert rig.disk.starts == {ExpertKey(1, 4): 1}
    assert stats.stall.late_prefetch > 0.01
    assert stats.stall.total == stats.stall.late_prefetch


def test_wrong_guesses_are_dropped_and_what_they_moved_is_wasted(make_rig: Make, read_gate: Any) -> None:
    rig = make_rig("disk", threads=1, pages=1, piece_bytes=4096, slots=3)
    read_gate.shut()
    rig.store.prefetch(1, [4, 5, 6], distance=1, budget_bytes=BUDGET)
    read_gate.wait_for(1)
    open_once_waited_for(rig, read_gate)
    rig.step(1, [0, 1])
    rig.settle()
    stats = rig.store.snapshot()
    assert rig.disk.bytes_read == 3 * 4096  # 0, 1 and the guess that was being read
    assert stats.prefetch.issued == 3
    assert stats.prefetch.used + stats.prefetch.late == 0
    assert stats.prefetch.wasted_bytes in (0, 4096)  # the guess stays where its last byte has come


def test_a_guess_that_is_evicted_unused_is_wasted(make_rig: Make) -> None:
    rig = make_rig("disk", slots=2)
    rig.store.prefetch(1, [4], distance=1, budget_bytes=BUDGET)
    rig.settle()
    rig.step(1, [0, 1])
    assert rig.store.snapshot().prefetch.wasted_bytes == rig.size(1, 4)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_stalls_where_everything_is_there(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=EXPERTS, ram_slots=EXPERTS)
    rig.tier.preload()
    rig.settle()
    for step in routes(20, seed=0):
        for layer, experts in enumerate(step):
            assert rig.step(layer, experts) == [experts]
    stats = rig.store.snapshot()
    assert stats.stall.total == 0
    assert stats.misses == 0
    assert stats.hits == 20 * LAYERS * 2


def test_waits_are_charged_to_the_disk_or_to_the_link(make_rig: Make, read_gate: Any) -> None:
    rig = make_rig("ram+disk", slots=2, ram_slots=8)
    read_gate.shut()
    open_once_waited_for(rig, read_gate)
    rig.step(0, [0, 1])
    first = rig.store.snapshot()
    assert first.stall.disk > 0.01
    assert first.bytes.disk == first.bytes.h2d == rig.size(0, 0) + rig.size(0, 1)
    rig.step(0, [2, 3])
    before = rig.store.snapshot()
    rig.step(0, [0, 1])  # from RAM now
    stall = (rig.store.snapshot() - before).stall
    assert stall.disk == 0
    assert stall.demand > 0
    assert stall.total == stall.demand
    assert rig.store.snapshot().bytes.disk == before.bytes.disk


def test_tally_agrees_with_the_snapshot(make_rig: Make) -> None:
    rig = make_rig("ram+disk")
    for step in routes(10, seed=1):
        for layer, experts in enumerate(step):
            rig.step(layer, experts)
    tally, stats = rig.store.tally(), rig.store.snapshot()
    assert tally == (stats.stall.total, stats.hits, stats.misses, stats.bytes.h2d, stats.bytes.disk)
    assert tally.stall_s > 0


def test_device_waits_do_not_pile_up_where_nobody_asks_for_figures(make_rig: Make) -> None:
    rig = make_rig("ram", slots=2)
    for i in range(1500):
        rig.step(0, [i % 8, (i + 1) % 8])
    assert len(rig.store.stalls._waits) <= 1100
    assert rig.store.snapshot().stall.demand > 0.001 * 1100


# Order, waves, room


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_more_experts_than_slots_come_in_waves(make_rig: Make, mode: str, slots: int) -> None:
    rig = make_rig(mode, slots=slots, ram_slots=2)
    rng = random.Random(slots)
    for _ in range(15):
        for layer in range(LAYERS):
            before = rig.store.snapshot()
            resident = set(rig.tier.cache.residents(layer))
            wanted = rng.sample(range(EXPERTS), EXPERTS)
            groups = rig.step(layer, wanted)
            counts = rig.store.snapshot() - before
            assert counts.hits == len(resident)  # those that were there are used before they are evicted
            assert counts.misses == EXPERTS - len(resident)
            assert set(groups[0]) <= resident or not resident


def test_resident_experts_come_first_and_at_once(make_rig: Make, read_gate: Any) -> None:
    rig = make_rig("disk", slots=4)
    rig.step(0, [1, 2])
    read_gate.shut()
    serving = rig.store.serve(0, [5, 2, 6, 1])
    assert [lease.expert for lease in next(serving)] == [2, 1]
    read_gate.open()
    rest = [lease.expert for group in serving for lease in group]
    assert sorted(rest) == [5, 6]
    rig.check()


def test_prefetches_are_asked_for_once_after_the_misses_were_requested(make_rig: Make) -> None:
    rig = make_rig("disk", slots=2)
    calls: list[tuple[int, ...]] = []
    rig.step(0, [3, 4, 5], lambda: calls.append(rig.tier.cache.loading(0)))
    assert calls == [(3, 4)]
    rig.step(0, [6, 7])
    rig.step(0, [7, 6], lambda: calls.append(rig.tier.cache.loading(0)))
    assert calls == [(3, 4), ()]


@pytest.mark.parametrize("mode", MODES)
def test_prefetch_keeps_its_budget_and_its_own_guesses(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=3, pages=1)
    rig.step(1, [0, 1, 2])
    rig.settle()
    rig.store.prefetch(1, [0, 5, 1, 6, 7], distance=1, budget_bytes=3 * 4096)
    assert set(rig.tier.cache.loading(1)) == {5}  # in place of 2; 0 and 1 are guesses, too
    assert {0, 1} <= set(rig.tier.cache.residents(1))
    rig.settle()
    rig.store.prefetch(2, [5, 6, 7], distance=1, budget_bytes=2 * 4096)
    assert rig.tier.cache.loading(2) == (5, 6)
    rig.store.prefetch(0, [5], distance=1, budget_bytes=2 * 4096)  # counts what is under way already
    assert mode != "disk" or rig.tier.cache.loading(0) in ((), (5,))
    rig.settle()


def test_a_prefetch_that_does_not_fit_the_budget_ends_the_request(make_rig: Make) -> None:
    rig = make_rig("disk", slots=3, pages=2)
    sizes = [rig.size(0, expert) // 4096 for expert in range(EXPERTS)]
    small, other = [expert for expert, pages in enumerate(sizes) if pages == 1][:2]
    large = sizes.index(2)
    rig.store.prefetch(0, [small, large, other], distance=1, budget_bytes=2 * 4096)
    assert rig.tier.cache.loading(0) == (small,)  # the likeliest only: no gaps filled with less likely ones
    rig.settle()


def test_the_host_goes_on_once_a_copy_was_issued(make_rig: Make, make_device: Make) -> None:
    rig = make_rig("ram+disk", device=make_device(luck=0.0, lazy=True))  # nothing happens by itself
    for group in rig.store.serve(0, [1, 2]):
        assert rig.device.copying
        for lease in group:
            rig.check_lease(0, lease)
    rig.device.synchronize()
    rig.settle()


@pytest.mark.parametrize("mode", MODES)
def test_prefetches_in_every_slot_are_no_deadlock(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=2, ram_slots=1)
    for round_ in range(20):
        for layer in range(LAYERS):
            rig.store.prefetch(layer, [2 * round_ % 8, (2 * round_ + 1) % 8], distance=1, budget_bytes=BUDGET)
        for layer in range(LAYERS):
            rig.step(layer, [(2 * round_ + 3) % 8, (2 * round_ + 1) % 8])


def test_an_expert_of_the_step_is_not_evicted_for_another_while_a_wrong_guess_holds_a_slot(
    make_rig: Make, make_device: Make
) -> None:
    device = make_device(luck=0.0)
    rig = make_rig("ram", slots=2, device=device)
    rig.step(0, [1])
    rig.settle()
    rig.store.prefetch(0, [7], distance=1, budget_bytes=BUDGET)  # a copy that was issued cannot be cancelled
    wait = rig.copies.wait
    rig.copies.wait = lambda seconds: (time.sleep(0.001), wait(seconds))  # long enough for any clock to see
    rig.step(0, [0, 1])
    stats = rig.store.snapshot()
    assert (stats.hits, stats.misses) == (1, 2)
    assert stats.stall.late_prefetch > 0


def test_two_iterators_over_one_full_layer_are_told_so(make_rig: Make) -> None:
    rig = make_rig("disk", slots=2)
    first = rig.store.serve(0, [1, 2])
    next(first)
    with pytest.raises(RuntimeError, match="leased to another"):
        list(rig.store.serve(0, [3, 4]))
    first.close()
    rig.check()


def test_a_layer_without_slots_is_refused(make_rig: Make) -> None:
    with pytest.raises(ValueError, match="slot"):
        make_rig("disk", slots=0)


# Faults


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_consumer_that_stops_half_way_leaves_no_lease(make_rig: Make, mode: str, taken: int) -> None:
    rig = make_rig(mode, slots=2)
    for layer in range(LAYERS):
        serving = rig.store.serve(layer, [3, 1, 4, 5, 0])
        for _ in range(taken):
            next(serving)
        serving.close()
        rig.check()
    for layer in range(LAYERS):
        rig.step(layer, [4, 1])
    rig.settle()


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_the_consumer_leaves_no_lease(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=3)

    def consume() -> None:
        for group in rig.store.serve(0, [3, 1, 4]):
            raise ConsumerError(group)

    with pytest.raises(ConsumerError):
        consume()
    gc.collect()  # the iterator was not closed by hand
    rig.check()
    rig.step(0, [3, 1, 4])


def test_an_exception_where_prefetches_are_requested_leaves_no_lease(make_rig: Make) -> None:
    rig = make_rig("disk", slots=3)

    def requested() -> None:
        raise ConsumerError

    with pytest.raises(ConsumerError):
        list(rig.store.serve(0, [3, 1, 4], requested))
    rig.check()
    rig.step(0, [3, 1, 4])


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_ctrl_c_ends_a_wait(make_rig: Make, faults: Faults, read_gate: Any, mode: str) -> None:
    rig = make_rig(mode, slots=3)
    read_gate.shut()
    faults.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        list(rig.store.serve(0, [3, 1, 4]))
    rig.check()
    read_gate.open()
    rig.step(0, [3, 1, 2])
    rig.settle()


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_failed_demand_raises_one_line_once_and_is_served_when_the_fault_is_gone(
    make_rig: Make, read_gate: Any, mode: str
) -> None:
    rig = make_rig(mode, slots=3)
    for expert in (1, 4):
        read_gate.errors[rig.locations[ExpertKey(0, expert)].offset] = OSError(
            errno.EIO, "Input/output error"
        )
    with pytest.raises(
        TransferError, match=r"^expert [14] of MoE layer 0 in .* could not be read: .*$"
    ) as info:
        list(rig.store.serve(0, [3, 1, 4]))
    assert "\n" not in str(info.value)
    rig.settle()
    rig.step(0, [3, 2])
    read_gate.errors.clear()
    rig.step(0, [4, 1, 3])
    rig.settle()


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_flipped_byte_on_disk_is_never_served(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode)
    whole = rig.path.read_bytes()
    at = rig.locations[ExpertKey(2, 6)].offset + 77
    with open(rig.path, "r+b") as file:
        file.seek(at)
        file.write(bytes([whole[at] ^ 4]))
    for _ in range(2):
        with pytest.raises(TransferError, match=r"expert 6 of MoE layer 2 .* wrong checksum"):
            list(rig.store.serve(2, [0, 6]))
        rig.check()
    with open(rig.path, "r+b") as file:
        file.write(whole)
    rig.step(2, [0, 6])


def test_a_file_cut_while_open_is_named_and_serves_again_when_mended(make_rig: Make) -> None:
    rig = make_rig("disk")
    whole = rig.path.read_bytes()
    rig.step(0, [0])
    os.truncate(rig.path, rig.locations[ExpertKey(2, 7)].offset + 10)
    with pytest.raises(TransferError, match=r"expert 7 of MoE layer 2 .* is cut off"):
        list(rig.store.serve(2, [7, 1]))
    rig.check()
    with open(rig.path, "r+b") as file:
        file.write(whole)
    rig.step(2, [7, 1])


def test_leases_under_way_survive_the_close_of_the_store(make_rig: Make, read_gate: Any) -> None:
    rig = make_rig("disk", slots=3)
    rig.step(0, [1])
    read_gate.shut()
    serving = rig.store.serve(0, [1, 2, 3])
    (lease,) = next(serving)
    threading.Timer(0.02, read_gate.open).start()
    rig.store.close()
    rig.check_lease(0, lease)  # the memory goes with its last view
    serving.close()
    rig.check()


# Anything, in any order

experts_ = st.lists(st.integers(0, EXPERTS - 1), unique=True, min_size=1, max_size=EXPERTS)
layers_ = st.integers(0, LAYERS - 1)
guess_ = st.tuples(st.just("guess"), layers_, experts_, st.integers(1, 3), st.integers(0, 12))
operations = st.one_of(
    st.tuples(st.just("serve"), layers_, experts_),
    st.tuples(st.just("serve and guess"), layers_, experts_, guess_),
    st.tuples(st.just("stop"), layers_, experts_, st.integers(0, 3)),
    st.tuples(st.just("throw"), layers_, experts_, st.integers(1, 3)),
    st.tuples(st.just("interrupt"), layers_, experts_),
    st.tuples(st.just("fail"), layers_, experts_, st.integers(1, 3)),
    st.tuples(
        st.sampled_from(["fail_copies", "fail_records"]), layers_, experts_, st.integers(1, 4), layers_
    ),
    guess_,
    st.tuples(st.just("poll")),
    st.tuples(st.just("settle")),
)


class Account:
    """Counts the guesses that left unused, which the statistics give in bytes only."""

    def __init__(self, rig: Any) -> None:
        self.rig, self.left = rig, 0
        cache = rig.tier.cache
        for name, expert_at in (("abandon", 1), ("_evict", 2)):
            setattr(cache, name, self._counting(cache, getattr(cache, name), expert_at))

    def _counting(self, cache: Any, original: Callable[..., None], expert_at: int) -> Callable[..., None]:
        def counting(layer: int, *args: Any) -> None:
            self.left += args[expert_at - 1] in cache._pools[layer].unused
            original(layer, *args)

        return counting

    def check(self) -> None:
        prefetch = self.rig.store.snapshot().prefetch
        unused = sum(len(pool.unused) for pool in self.rig.tier.cache._pools.values())
        assert prefetch.issued == prefetch.used + prefetch.late + self.left + unused


def perform(rig: Any, faults: Faults, operation: tuple[Any, ...]) -> None:
    what, *rest = operation
    if what == "serve":
        rig.step(*rest)
    elif what == "serve and guess":
        layer, experts, guess = rest
        rig.step(layer, experts, lambda: perform(rig, faults, guess))
    elif what == "guess":
        layer, experts, distance, pages = rest
        rig.store.prefetch(layer, experts, distance=distance, budget_bytes=4096 * pages)
    elif what == "stop":
        layer, experts, groups = rest
        serving = rig.serve(layer, experts)
        for _, group in zip(range(groups), serving, strict=False):
            for lease in group:
                rig.check_lease(layer, lease)
        serving.close()
    elif what == "throw":
        layer, experts, groups = rest
        with contextlib.suppress(ConsumerError):
            for i, group in enumerate(rig.serve(layer, experts)):
                for lease in group:
                    rig.check_lease(layer, lease)
                if i == groups:
                    raise ConsumerError
    elif what == "interrupt":
        faults.interrupt = True
        with contextlib.suppress(KeyboardInterrupt):
            rig.step(*rest)
        faults.interrupt = False
    elif what == "fail":
        layer, experts, faults.reads = rest
        with contextlib.suppress(TransferError):
            rig.step(layer, experts)
        rig.settle()  # or a read that is failing now would fail a step that is to succeed
        faults.reads = 0
    elif what.startswith("fail_"):
        layer, experts, count, on = rest
        if rig.devices:
            card = rig.device_of(on)
            setattr(card, what, count)
            with contextlib.suppress(TransferError, RuntimeError):
                rig.step(layer, experts)
            setattr(card, what, 0)
    elif what == "poll":
        rig.tier.poll()
    else:
        rig.settle()


@pytest.mark.parametrize(
    ("mode", "lazy", "shared"),
    others_slow(
        [("disk", False, None), *itertools.product(MODES[1:], (False, True), (None, "auto", "cpu"))],
        [
            ("disk", False, None),
            *((mode, mode == MODES[1], way) for mode in MODES[1:] for way in (None, "auto")),
        ],
    ),
)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
@given(
    slots=st.integers(1, 5),
    ram_slots=st.integers(1, 5),
    seed=st.integers(0, 1 << 16),
    luck=st.sampled_from([0.0, 0.2, 0.7]),
    sized=st.booleans(),
    steps=st.lists(operations, min_size=5, max_size=60),
)
def test_any_sequence_of_events(
    make_rig: Make,
    make_device: Make,
    faults: Faults,
    any_scheduler: Make,
    mode: str,
    lazy: bool,
    shared: str | None,
    slots: int,
    ram_slots: int,
    seed: int,
    luck: float,
    sized: bool,
    steps: list[tuple[Any, ...]],
) -> None:
    device = None if mode == "disk" else make_device(seed, luck, lazy=lazy)
    if device is not None and seed % 2:
        device = [device, make_device(seed + 1, luck, lazy=lazy), device]
    scheduler = any_scheduler(seed, shared) if shared else None
    rig = make_rig(mode, slots=slots, ram_slots=ram_slots, device=device, scheduler=scheduler, sized=sized)
    rig.tokens = lambda expert: 1 + expert % 3
    account = Account(rig)
    for operation in steps:
        perform(rig, faults, operation)
        rig.check()
        account.check()
    rig.settle()
    for layer in range(LAYERS):
        rig.step(layer, list(range(EXPERTS)))
    rig.settle()
    account.check()
    rig.close()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moe-local-read")]


def soak(make_rig: Make, mode: str, steps: int, scheduler: Any = None, *, sized: bool = False) -> None:
    """Random steps with guesses and aborted consumers: what the process holds must not grow."""
    rig = make_rig(mode, slots=3, ram_slots=4, pages=1 + sized, scheduler=scheduler, sized=sized)
    rng = random.Random(0)
    process = psutil.Process()
    everything = list(range(EXPERTS))

    def guess(layer: int) -> Callable[[], None]:
        target = (layer + 1) % LAYERS
        return lambda: rig.store.prefetch(target, rng.sample(everything, 2), distance=1, budget_bytes=8192)

    def run(count: int) -> None:
        for i in range(count):
            layer = i % LAYERS
            wanted = rng.sample(everything, 6 if rng.random() < 0.02 else 2)
            serving = rig.serve(layer, wanted, guess(layer))
            for group in serving:
                if i % 16 == 0:
                    for lease in group:
                        rig.check_lease(layer, lease)
                if rng.random() < 0.02:
                    serving.close()
            if i % 256 == 0:
                rig.check()
        rig.settle()
        rig.store.snapshot()
        gc.collect()

    run(steps // 4)
    threads, files, objects = len(readers()), process.num_fds(), len(gc.get_objects())
    memory = process.memory_info().rss
    run(steps - steps // 4)
    assert len(readers()) == threads
    assert process.num_fds() <= files  # what earlier tests have left behind may go meanwhile
    assert len(gc.get_objects()) - objects < 500
    assert process.memory_info().rss - memory < 4 << 20
    counts = rig.store.snapshot()
    assert counts.hits + counts.misses > 1.9 * steps
    for layer in range(LAYERS):
        rig.step(layer, everything)


@pytest.mark.skipif(not Path("/proc").exists(), reason="counts open files")
@pytest.mark.parametrize("mode", others_slow(MODES, MODES[-1:]))
def test_nothing_leaks(make_rig: Make, mode: str) -> None:
    soak(make_rig, mode, 2_000 if mode == "ram+disk" else 3_000, sized=mode != "ram+disk")


def test_nothing_leaks_where_the_host_computes(make_rig: Make, any_scheduler: Make) -> None:
    soak(make_rig, "ram+disk", 2_000, any_scheduler())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_nothing_leaks_in_a_long_run(make_rig: Make, mode: str) -> None:
    soak(make_rig, mode, 100_000, sized=True)


def test_close_is_quick_and_leaves_no_thread_with_a_disk_that_hangs(
    make_rig: Make, read_gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "CLOSING_S", 600)
    rig = make_rig("disk", threads=2)
    threads = [*rig.disk._threads]
    read_gate.shut()
    rig.store.prefetch(0, [1, 2, 3], distance=1, budget_bytes=BUDGET)
    read_gate.wait_for(2)
    threading.Timer(0.05, read_gate.open).start()
    began = time.perf_counter()
    rig.store.close()
    assert time.perf_counter() - began < 200
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_disk_that_gives_nothing_is_named_and_serves_again_when_it_comes_back(
    make_rig: Make, read_gate: Any, mode: str
) -> None:
    rig = make_rig(mode, slots=3)
    rig.step(0, [0])
    rig.store._disk.patience.seconds = 0.3
    read_gate.shut()
    for _ in range(2):  # it waits as long again
        began = time.perf_counter()
        with pytest.raises(
            TransferError, match=r"^expert [14] of MoE layer 0 in .* given nothing for 0 s; check the disk"
        ):
            list(rig.store.serve(0, [1, 4]))
        assert time.perf_counter() - began > 0.25
        rig.check()
    rig.store._disk.patience.seconds = PATIENCE_S  # on a busy machine the reads may take 0.3 seconds
    read_gate.open()
    rig.step(0, [1, 4])
    rig.settle()


class Counted(Patience):
    """Each wait is a second; behind every second one a read is let through, and its end waited for."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.seconds = 2.5
        self.waits = 0
        self._gate = gate
        self._moves = 0

    def moved(self) -> None:
        super().moved()
        self._moves += 1

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        self.waits += 1
        self._waited += 1.0
        if self.waits % 2 == 0:
            moves = self._moves
            self._gate.let()
            deadline = time.monotonic() + 100
            while self._moves == moves and time.monotonic() < deadline:
                changed.wait(0.001)


def test_a_slow_disk_is_no_dead_one(make_rig: Make, read_gate: Any) -> None:
    """Whatever moves, be it for another layer, starts the time anew."""
    rig = make_rig("disk", slots=3, threads=1, piece_bytes=1024)
    patience = rig.store._disk.patience = Counted(read_gate)
    read_gate.shut()
    rig.store.prefetch(0, [1, 2], distance=1, budget_bytes=BUDGET)
    read_gate.wait_for(1)
    assert len([lease for group in rig.store.serve(1, [5]) for lease in group]) == 1
    assert patience.waits >= 2 * 5  # the piece of a guess, and the four or eight of the expert
    rig.store._disk.patience = Patience()
    read_gate.open()
    rig.settle()


# Starting over


@pytest.mark.parametrize("mode", ["disk", "ram", "ram+disk"])
def test_an_emptied_store_misses_everything_it_had_to_bring(make_rig: Make, mode: str) -> None:
    """Loads under way are given up; what has a slot for good stays, and so do the counts."""
    rig = make_rig(mode, slots=3)
    rig.step(0, [0, 1, 2])
    rig.store.prefetch(1, [0, 1], distance=1, budget_bytes=1 << 30)
    before = rig.store.snapshot()
    rig.store.empty()
    rig.check()
    assert not rig.tier.loading
    assert all(rig.tier.cache.residents(layer) == () for layer in range(rig.num_layers))
    assert rig.store.snapshot().hits == before.hits
    rig.step(0, [2, 1, 0])
    assert rig.store.snapshot().misses == before.misses + 3
    rig.settle()


def test_a_store_is_emptied_while_a_copy_runs_that_kernels_wait_for(
    make_rig: Make, make_device: Make
) -> None:
    """Until its end the expert stays pinned in RAM, which is emptied, too."""
    device = make_device(luck=0.0, lazy=True)  # nothing ends by itself
    rig = make_rig("ram+disk", slots=2, ram_slots=2, device=device)
    rig.step(0, [0, 1])
    assert device.copying
    rig.store.empty()
    assert [tier.cache.residents(0) for tier in (rig.tier, rig.ram)] == [(), ()]
    rig.step(0, [1, 0])
    assert rig.store.snapshot().misses == 4
    rig.settle()


def test_a_store_that_holds_everything_is_not_emptied(make_rig: Make) -> None:
    rig = make_rig("disk", slots=5, experts=5)
    rig.step(0, [0, 1])
    rig.store.empty()
    rig.step(0, [1, 0])
    assert (rig.store.snapshot().hits, rig.store.snapshot().misses) == (2, 2)


def test_a_snapshot_without_the_table_of_routed_tokens(make_rig: Make) -> None:
    rig = make_rig("disk", slots=3)
    rig.step(0, [0, 1])
    whole, small = rig.store.snapshot(), rig.store.snapshot(routed=False)
    assert small.routed.counts == ()
    assert (small.misses, small.bytes, small.stall) == (whole.misses, whole.bytes, whole.stall)
