"""Long steps: the bytes are right, nobody is flushed, copies and computing overlap, nothing is left over."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import TransferError
from moe_local.cache.keys import ExpertKey

Make = Callable[..., Any]
MODES = ("disk", "ram", "ram+disk")
LAYERS, EXPERTS = 3, 8
ALL = list(range(EXPERTS))


def order(rig: Any, layer: int, tier: Any = None) -> list[int]:
    """The eviction order of a layer, whatever another tier holds."""
    policy = (tier or rig.tier).cache._pools[layer].policy
    return list(getattr(policy, "_policy", policy).coldest())


def prompt(rig: Any, recent: list[int] | None = None, length: int = 500) -> None:
    """All layers of a step that uses every expert."""
    rig.store.prefill.begin(1, length)
    for layer in range(LAYERS):
        rig.step(layer, ALL, None, recent or [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("staging", [2, 3, 5, 8])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_prompt_passes_and_leaves_everything_as_it_was(
    make_rig: Make, make_device: Make, mode: str, staging: int, lazy: bool
) -> None:
    device = None if mode == "disk" else make_device(staging, 0.2, lazy=lazy)
    rig = make_rig(mode, slots=3, ram_slots=4, staging=staging, device=device)
    for layer in range(LAYERS):
        rig.step(layer, [5, 1])
        rig.step(layer, [2])
    rig.settle()
    before, orders = rig.store.snapshot(), [order(rig, layer) for layer in range(LAYERS)]
    below = [order(rig, layer, rig.ram) for layer in range(LAYERS)]
    for _ in range(3):
        prompt(rig)
        rig.settle()
        assert [order(rig, layer) for layer in range(LAYERS)] == orders
        assert mode != "ram+disk" or [order(rig, layer, rig.ram)[:3] for layer in range(LAYERS)] == [
            list(kept[:3]) for kept in below
        ]
    counts = rig.store.snapshot() - before
    assert counts.evictions == 0
    assert counts.hits + counts.misses == 3 * LAYERS * EXPERTS
    assert counts.hits_by_layer[0] >= 3 * 3
    assert rig.tier.cache.staging.used == 0
    moved = counts.bytes.disk if mode == "disk" else counts.bytes.h2d
    absent = sum(rig.size(layer, e) for layer in range(LAYERS) for e in ALL if e not in (5, 1, 2))
    assert moved == 3 * absent
    assert counts.prefetch.wasted_bytes == 0


@pytest.mark.parametrize("mode", MODES)
def test_experts_that_pass_stay_where_slots_are_empty(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=3, ram_slots=4, staging=2)
    prompt(rig)
    rig.settle()
    for layer in range(LAYERS):
        assert len(rig.tier.cache.residents(layer)) == 3
    counts = rig.store.snapshot()
    assert counts.misses + counts.hits == LAYERS * EXPERTS
    prompt(rig)
    assert (rig.store.snapshot() - counts).hits >= 9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recent", [[0], [6, 1, 0], [2, 7, 5]])
def test_the_last_tokens_experts_are_what_decoding_starts_with(
    make_rig: Make, mode: str, recent: list[int]
) -> None:
    rig = make_rig(mode, slots=3, ram_slots=4, staging=2)
    for layer in range(LAYERS):
        rig.step(layer, [5, 1, 2])
    rig.settle()
    before = rig.store.snapshot()
    prompt(rig, recent)
    rig.settle()
    kept = [e for e in (5, 1, 2) if e not in recent][len([e for e in recent if e not in (5, 1, 2)]) :]
    assert [order(rig, layer) for layer in range(LAYERS)] == [[*kept, *recent]] * LAYERS
    counts = rig.store.snapshot() - before
    assert counts.evictions == LAYERS * len([e for e in recent if e not in (5, 1, 2)])
    assert counts.misses + counts.hits == LAYERS * EXPERTS
    read = sum(rig.size(layer, e) for layer in range(LAYERS) for e in ALL if e not in (5, 1, 2))
    assert read == (counts.bytes.disk if mode == "disk" else counts.bytes.h2d)


def test_recent_experts_are_those_of_each_rows_last_tokens(make_rig: Make) -> None:
    rig = make_rig("disk", slots=3, staging=2)
    prefill = rig.store.prefill
    ids = [e for token in range(40) for e in (token % 5, 5 + token % 3)]
    prefill.begin(1, 40)
    assert prefill.recent(0, ids, 8) == [7, 4, 5]  # the last two tokens have (3, 7) and (4, 5)
    prefill.begin(2, 20)
    assert set(prefill.recent(0, [0, 1] * 19 + [2, 3] + [4, 5] * 19 + [6, 7], 8) or ()) == {2, 3, 7}
    prefill.begin(1, 1)
    assert prefill.recent(0, ids[:2], 2) is None, "decoding"
    prefill.begin(40, 1)
    assert prefill.recent(0, ids, 8) is None, "a batch of decoding rows is no prompt"
    prefill.begin(1, 4)
    assert prefill.recent(0, [0, 1] * 4, 2) is None, "all it needs fits"
    assert prefill.recent(0, ids[:8], 7) is not None


# Reading ahead


def test_the_next_layer_is_read_while_this_one_computes(make_rig: Make) -> None:
    """While an expert is leased the ring's other slot is never empty, up to and with the layer's last one."""
    rig = make_rig("disk", slots=2, staging=2)
    for layer in range(LAYERS):
        rig.step(layer, [0, 1])
    rig.store.prefill.begin(1, 500)
    for layer in range(LAYERS):
        for group in rig.store.serve(layer, ALL, None, None, []):
            for lease in group:
                rig.check_lease(layer, lease)
            left = {key for key in rig.tier.cache.staging._keys if key.layer == layer}
            assert rig.tier.cache.staging.used == 2 or (layer == LAYERS - 1 and len(left) < 2)
    counts = rig.store.snapshot()
    assert counts.prefetch.issued == 3 * 2
    assert counts.prefetch.used + counts.prefetch.late == 3 * 2
    assert counts.prefetch.wasted_bytes == 0


def test_a_device_is_not_made_to_wait_for_more_than_comes_next(make_rig: Make, make_device: Make) -> None:
    device = make_device(luck=0.0, lazy=True)  # nothing happens by itself
    rig = make_rig("ram", slots=2, staging=4, device=device)
    rig.step(0, [0, 1])
    waits = []
    wait = device.wait
    device.wait = lambda event: waits.append(event) or wait(event)
    rig.store.prefill.begin(1, 10)
    given = 0
    for group in rig.store.serve(0, ALL, None, None, []):
        given += len([lease for lease in group if lease.expert not in (0, 1)])
        assert len(waits) <= given
        for lease in group:
            rig.check_lease(0, lease)
    assert given == len(waits) == 6
    rig.settle()


@pytest.mark.parametrize("mode", MODES)
def test_what_was_read_ahead_and_not_needed_is_wasted(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=2, staging=3, ram_slots=2)
    rig.step(1, [0, 1])
    rig.store.prefill.begin(1, 500)
    rig.step(0, ALL, None, [])
    rig.settle_loads()
    ahead = [key for key in rig.tier.cache.staging._keys if key.layer == 1]
    assert len(ahead) == 3
    rig.step(1, [0, 1, 7], None, [])  # 2 to 4 were read
    assert rig.store.snapshot().prefetch.wasted_bytes == sum(rig.size(*key) for key in ahead)
    assert rig.store.snapshot().prefetch.issued >= 3
    assert not [key for key in rig.tier.cache.staging._keys if key.layer == 1]
    rig.settle_loads()
    rig.step(2, [0, 1])  # decoding gives up what the layer before had read ahead
    rig.settle()
    assert rig.tier.cache.staging.used == 0


@pytest.mark.parametrize("mode", MODES)
def test_where_few_are_used_only_guesses_are_read_ahead(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=2, staging=4, ram_slots=2)
    for layer in range(LAYERS):
        rig.step(layer, [0, 1])
    rig.settle()
    rig.store.prefill.begin(1, 20)
    guess = [6, 0, 3]
    rig.step(0, [0, 1, 2, 5], lambda: rig.store.prefetch(1, guess, distance=1, budget_bytes=1), [])
    assert set(rig.tier.cache.staging._keys) == {(1, 6), (1, 3)}
    assert rig.tier.cache.residents(1) == (0, 1), "nobody is evicted for a guess"
    rig.settle_loads()
    before = rig.store.snapshot()
    rig.step(1, [0, 6, 5], None, [])
    counts = rig.store.snapshot() - before
    assert (counts.hits, counts.misses, counts.prefetch.used) == (2, 1, 1)
    assert counts.prefetch.wasted_bytes == rig.size(1, 3)


def test_nothing_is_read_ahead_where_that_is_off(make_rig: Make) -> None:
    rig = make_rig("disk", slots=2, staging=3)
    rig.store.prefill.ahead = False
    for _ in range(2):
        prompt(rig, [2, 3])
        assert rig.tier.cache.staging.used == 0
    assert rig.store.snapshot().prefetch.issued == 0


def test_a_full_chunk_reads_ahead_for_the_next_one(make_rig: Make) -> None:
    rig = make_rig("disk", slots=2, staging=2)
    rig.store.prefill.chunk = 500
    for layer in range(LAYERS):
        rig.step(layer, [0, 1])
    prompt(rig)
    assert {key.layer for key in rig.tier.cache.staging._keys} == {0}
    prompt(rig, length=499)
    assert rig.tier.cache.staging.used == 0
    rig.settle()


def test_a_first_layer_is_read_before_its_router_has_run(make_rig: Make) -> None:
    rig = make_rig("disk", slots=2, staging=2)
    rig.step(0, [0, 1])
    rig.store.prefill.begin(1, 1)
    assert rig.tier.cache.staging.used == 0
    rig.store.prefill.begin(1, 20)
    assert rig.tier.cache.staging.used == 0, "too few tokens to need them all"
    rig.store.prefill.begin(1, 2000)
    assert rig.tier.cache.staging.used == 2
    rig.step(0, ALL, None, [])
    assert rig.store.snapshot().prefetch.wasted_bytes == 0


def test_host_memory_below_is_not_flushed_either(make_rig: Make) -> None:
    rig = make_rig("ram+disk", slots=2, ram_slots=4, staging=2)
    for layer in range(LAYERS):
        for experts in ([0, 1], [2, 3], [4, 5]):
            rig.step(layer, experts)
    rig.settle()
    below = [order(rig, layer, rig.ram) for layer in range(LAYERS)]
    prompt(rig)
    rig.settle()
    assert [order(rig, layer, rig.ram) for layer in range(LAYERS)] == below
    assert rig.ram.cache.staging.used == 0
    assert rig.ram.cache.stats.evictions == LAYERS * 2


def test_without_a_ring_there_is_no_stream(make_rig: Make) -> None:
    for staging in (0, 1):
        rig = make_rig("disk", slots=2, staging=staging)
        assert rig.store.prefill is None
        rig.step(0, ALL)


# Two cards


@pytest.mark.parametrize("mode", ["ram", "ram+disk"])
@pytest.mark.parametrize("staging", [2, 3, 8])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("first", [1, 2])
def test_a_prompt_passes_over_two_cards_as_over_one(
    make_rig: Make, make_device: Make, mode: str, staging: int, lazy: bool, first: int
) -> None:
    """`first` layers are on the first card."""
    cards = [make_device(staging, 0.2, lazy=lazy), make_device(staging + 1, 0.2, lazy=lazy)]
    both = [cards[0]] * first + [cards[1]] * (LAYERS - first)
    found = []
    for device in (make_device(staging, 0.2, lazy=lazy), both):
        rig = make_rig(mode, slots=3, ram_slots=4, staging=staging, device=device)
        for layer in range(LAYERS):
            rig.step(layer, [5, 1, 2])
        rig.settle()
        orders = [order(rig, layer) for layer in range(LAYERS)]
        before = rig.store.snapshot()
        for _ in range(3):
            prompt(rig)
            rig.settle()
            assert [order(rig, layer) for layer in range(LAYERS)] == orders
        prompt(rig, [7, 0])
        rig.settle()
        assert rig.tier.cache.staging.used == 0
        counts = rig.store.snapshot() - before
        assert counts.prefetch.used + counts.prefetch.late == counts.prefetch.issued > 0
        found.append(
            (counts.hits + counts.misses, counts.evictions, counts.bytes, counts.prefetch.wasted_bytes)
        )
    assert found[0] == found[1]
    assert all(card.copies > 0 for card in cards)


def test_the_next_card_is_given_its_experts_while_this_one_computes(
    make_rig: Make, make_device: Make
) -> None:
    """Nothing ends by itself: what is read ahead over the boundary waits for nothing on the card before."""
    first, second = make_device(luck=0.0, lazy=True), make_device(1, luck=0.0, lazy=True)
    rig = make_rig("ram", slots=2, staging=4, device=[first, first, second])
    for layer in range(LAYERS):
        rig.step(layer, [0, 1])
    rig.store.prefill.begin(1, 500)
    rig.step(0, ALL, None, [])
    copies = second.copies
    serving = rig.store.serve(1, ALL, None, None, [])
    for group in serving:
        for lease in group:
            rig.check_lease(1, lease)
        if not any(key.layer == 1 for key in rig.tier.cache.staging._keys):
            break
    assert first.faults == second.faults == []
    serving.close()
    ahead = [key for key in rig.tier.cache.staging._keys if key.layer == 2]
    assert len(ahead) == rig.tier.cache.staging.slots
    assert second.copies == copies + len(ahead)
    second.synchronize()
    rig.tier.poll()
    assert all(rig.tier.cache.is_resident(*key) for key in ahead), "the other card has not moved"
    before = rig.store.snapshot()
    rig.step(2, ALL, None, [])
    assert (rig.store.snapshot() - before).prefetch.used == len(ahead)
    rig.settle()


def test_a_slot_is_loaded_again_after_what_its_own_card_read_from_it(
    make_rig: Make, make_device: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One card does not say where its kernels are; the other's answer is not taken for that."""
    first, second = make_device(luck=0.0, lazy=True), make_device(1, luck=0.0, lazy=True)
    rig = make_rig("ram", slots=2, staging=2, device=[first, second, first])
    rig.store.prefill.begin(1, 500)
    for layer in range(LAYERS):
        rig.step(layer, [0, 1])
    with pytest.raises(RuntimeError, match="no answer"):
        for group in rig.store.serve(0, ALL, None, None, []):
            for lease in group:
                rig.check_lease(0, lease)
                if lease.expert not in (0, 1):
                    monkeypatch.setattr(first, "record", refuse)
    rig.store.prefill.clear(0, [])
    rig.step(1, ALL, None, [])
    monkeypatch.undo()
    prompt(rig)
    rig.settle()


def refuse() -> None:
    raise RuntimeError("no answer")


# The host's share


@pytest.mark.parametrize("mode", ["ram", "ram+disk"])
@pytest.mark.parametrize("share", ["auto", "cpu"])
def test_the_host_takes_part_in_a_long_step(
    make_rig: Make, any_scheduler: Make, mode: str, share: str
) -> None:
    rig = make_rig(mode, slots=2, ram_slots=6, staging=2, scheduler=any_scheduler(3, share))
    for _ in range(4):
        prompt(rig, [3, 4])
    rig.settle()
    assert rig.on_host > 0


# Faults


@pytest.mark.parametrize("mode", ["disk", "ram+disk"])
def test_a_failed_read_in_mid_prompt_is_raised_once(make_rig: Make, read_gate: Any, mode: str) -> None:
    rig = make_rig(mode, slots=2, staging=2)
    offset = rig.locations[ExpertKey(1, 6)].offset
    read_gate.errors[offset] = OSError(5, "Input/output error")
    with pytest.raises(TransferError, match="expert 6 of MoE layer 1"):
        prompt(rig, [1, 2])
    rig.check()
    rig.settle()
    rig.step(1, [0, 3])
    read_gate.errors.clear()
    prompt(rig, [1, 2])
    rig.settle()


@pytest.mark.parametrize("several", [False, True])
def test_a_failed_copy_in_mid_prompt_is_raised_once(make_rig: Make, make_device: Make, several: bool) -> None:
    device = make_device(luck=0.1)
    rig = make_rig(
        "ram", slots=2, staging=3, device=[make_device(1, 0.1), device, device] if several else device
    )
    prompt(rig, [1, 2])
    rig.store.prefill.begin(1, 500)
    rig.step(0, ALL, None, [3])
    device.fail_copies = 4
    with pytest.raises(TransferError, match="could not be copied"):
        for layer in (1, 2):
            rig.step(layer, ALL, None, [3])
    rig.settle()
    device.fail_copies = 0
    prompt(rig, [1, 2])
    rig.settle()


@pytest.mark.parametrize("mode", MODES)
def test_the_store_can_be_closed_in_mid_prompt(make_rig: Make, mode: str) -> None:
    rig = make_rig(mode, slots=2, staging=3)
    threads = [*rig.disk._threads]
    rig.store.prefill.begin(1, 500)
    serving = rig.store.serve(0, ALL, None, None, [1])
    for lease in next(serving):
        rig.check_lease(0, lease)
    rig.store.close()
    serving.close()
    rig.check()
    assert mode != "disk" or not any(thread.is_alive() for thread in threads)


# Anything, in any order

experts_ = st.lists(st.integers(0, EXPERTS - 1), unique=True, min_size=1, max_size=EXPERTS)
layers_ = st.integers(0, LAYERS - 1)
recent_ = st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=4)
operations = st.one_of(
    st.tuples(st.just("prompt"), recent_, experts_),
    st.tuples(st.just("long"), layers_, experts_, recent_),
    st.tuples(st.just("decode"), layers_, experts_),
    st.tuples(st.just("begin"), st.sampled_from([1, 30, 3000])),
    st.tuples(st.just("stop"), layers_, experts_, recent_, st.integers(0, 3)),
    st.tuples(st.just("interrupt"), layers_, experts_, recent_, st.integers(0, 4)),
    st.tuples(st.just("fail"), layers_, experts_, recent_, st.integers(1, 3)),
    st.tuples(
        st.sampled_from(["fail_copies", "fail_moves", "fail_records"]),
        layers_,
        experts_,
        recent_,
        st.integers(1, 5),
        layers_,
    ),
    st.tuples(st.just("guess"), layers_, experts_, st.integers(0, 12)),
    st.tuples(st.sampled_from(["settle", "empty"])),
)


class Faults:
    """Reads that fail, and a Ctrl-C after so many looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        self.looks: int | None = None
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self.read)
        for module in ("store", "prefill"):
            monkeypatch.setattr(f"moe_local.offload.store.{module}.check_interrupt", self.look)

    def read(self, file: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if self.reads > 0:
            self.reads -= 1
            raise OSError(5, "Input/output error")
        return self._preadv(file, buffers, offset, *flags)

    def look(self) -> None:
        if self.looks is not None:
            self.looks -= 1
            if self.looks < 0:
                self.looks = None
                raise KeyboardInterrupt


@pytest.fixture
def faults(make_rig: Make, monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def recent_of(rig: Any, recent: list[int], experts: list[int]) -> list[int]:
    return [e for e in recent if e in experts][: rig.tier.cache.slots(0)]


def perform(rig: Any, faults: Faults, operation: tuple[Any, ...]) -> None:
    what, *rest = operation
    if what == "prompt":
        rig.store.prefill.begin(1, 400)
        for layer in range(LAYERS):
            rig.step(layer, rest[1], None, recent_of(rig, rest[0], rest[1]))
    elif what == "long":
        layer, experts, recent = rest
        rig.step(layer, experts, None, recent_of(rig, recent, experts))
    elif what == "decode":
        rig.step(*rest)
    elif what == "begin":
        rig.store.prefill.begin(1, rest[0])
    elif what == "stop":
        layer, experts, recent, groups = rest
        serving = rig.serve(layer, experts, None, recent_of(rig, recent, experts))
        for _, group in zip(range(groups), serving, strict=False):
            for lease in group:
                rig.check_lease(layer, lease)
        serving.close()
    elif what == "interrupt":
        layer, experts, recent, faults.looks = rest
        with contextlib.suppress(KeyboardInterrupt):
            rig.step(layer, experts, None, recent_of(rig, recent, experts))
        faults.looks = None
    elif what == "fail":
        layer, experts, recent, faults.reads = rest
        with contextlib.suppress(TransferError):
            rig.step(layer, experts, None, recent_of(rig, recent, experts))
        rig.settle()
        faults.reads = 0
    elif what.startswith("fail_"):
        layer, experts, recent, count, on = rest
        if rig.devices:
            card = rig.device_of(on)  # perhaps that of another layer, which is read ahead
            setattr(card, what, count)
            with contextlib.suppress(TransferError, RuntimeError):
                rig.step(layer, experts, None, recent_of(rig, recent, experts))
            setattr(card, what, 0)
    elif what == "guess":
        layer, experts, pages = rest
        rig.store.prefetch(layer, experts, distance=1, budget_bytes=4096 * pages)
    elif what == "empty":
        rig.store.empty()
    else:
        rig.settle()


@pytest.mark.parametrize(
    ("mode", "lazy", "shared"),
    [("disk", False, None), ("ram", True, None), ("ram+disk", True, None), ("ram+disk", False, "auto")],
)
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
@given(
    slots=st.integers(1, 5),
    ram_slots=st.integers(1, 5),
    staging=st.integers(2, 6),
    seed=st.integers(0, 1 << 16),
    luck=st.sampled_from([0.0, 0.2, 0.7]),
    sized=st.booleans(),
    steps=st.lists(operations, min_size=5, max_size=40),
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
    staging: int,
    seed: int,
    luck: float,
    sized: bool,
    steps: list[tuple[Any, ...]],
) -> None:
    device = None if mode == "disk" else make_device(seed, luck, lazy=lazy)
    if device is not None and seed % 2:
        device = [device, make_device(seed + 1, luck, lazy=lazy), device]
    rig = make_rig(
        mode,
        slots=slots,
        ram_slots=ram_slots,
        staging=staging,
        device=device,
        scheduler=any_scheduler(seed, shared) if shared else None,
        sized=sized,
    )
    for operation in steps:
        perform(rig, faults, operation)
        rig.check()
    rig.settle()
    prompt(rig, [1])
    rig.settle()
    for layer in range(LAYERS):
        rig.step(layer, [1, 2])
    rig.settle()
    for tier in (rig.tier, rig.ram):
        assert tier.cache.staging.used == 0
    rig.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_nothing_leaks_in_a_long_run(make_rig: Make, make_device: Make, mode: str) -> None:
    device = None if mode == "disk" else make_device(1, 0.4)
    rig = make_rig(mode, slots=3, ram_slots=4, staging=3, pages=1, device=device)
    rng = random.Random(0)
    for step in range(3000):
        rig.store.prefill.begin(1, rng.choice([1, 40, 1000]))
        for layer in range(LAYERS):
            wanted = rng.sample(ALL, rng.randint(1, EXPERTS))
            recent = wanted[:2] if rng.random() < 0.7 else None
            serving = rig.serve(layer, wanted, None, recent)
            for _ in serving:
                if rng.random() < 0.05:
                    serving.close()
        if step % 64 == 0:
            rig.check()
    rig.settle()
