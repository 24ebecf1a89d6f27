"""Tokens looked up and brought by a device that isn't there, with the host between: bytes, tables, counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.keys import ExpertKey
from moe_local.offload.gpu.device_misses import DeviceMisses
from moe_local.offload.tiers.shrink import shrink
from support import torch_kernels

LAYERS, EXPERTS, TOP_K = 3, 12, 3


class Checking:
    """Launches that look at the bytes that they would compute with."""

    width = hidden = 8

    def __init__(self, content: Callable[[int], bytes]) -> None:
        self.content = content
        self.ids: list[int] = []

    def planes(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def up(self, base: Any, stride: int, table: Any, planes: Any, hidden: Any, top_k: int) -> None:
        memory = base.as_strided((base.untyped_storage().nbytes(),), (1,), 0)
        assert table[:, 1].tolist() == list(range(len(self.ids)))
        for expert, start in zip(self.ids, table[:, 0].tolist(), strict=True):
            want = self.content(expert)
            first = base.storage_offset() + start * stride
            assert memory[first : first + len(want)].numpy().tobytes() == want, f"wrong bytes for {expert}"

    def down(self, base: Any, stride: int, table: Any, hidden: Any, outputs: Any) -> None:
        pass

    def combine(self, outputs: Any, weights: Any, combined: Any) -> None:
        combined.zero_()


class Machine:
    """A rig whose misses are left to the device, token by token."""

    def __init__(self, rig: Any, fetch: Any, slots: int) -> None:
        self.rig, self.store = rig, rig.store
        self.launchers = [
            Checking(lambda e, layer=layer: rig.content[ExpertKey(layer, e)])  # type: ignore[misc]
            for layer in range(LAYERS)
        ]
        self.misses = DeviceMisses(rig.store, self, fetch)  # type: ignore[arg-type]
        self.store.custody = self.misses
        self.tokens = 0

    def launcher(self, math: Any, device: Any, layout: Any) -> Any:
        """As GroupedExperts."""
        return self.launchers[math]

    def token(self, chosen: Sequence[Sequence[int]], layers: int = LAYERS) -> None:
        """One token with these experts by layer; fewer `layers`: it comes to no end."""
        self.misses.begin()
        x, weights = torch.zeros(1, 8), torch.ones(1, TOP_K)
        for layer, experts in enumerate(chosen[:layers]):
            self.launchers[layer].ids = list(experts)
            assert self.misses.layer(layer, layer, x, 1) is not None  # type: ignore[arg-type]
            self.misses.run(layer, x, torch.tensor([experts]), weights)
            self.misses.count(layer)
        if layers == LAYERS:
            self.misses.end()
        self.tokens += layers


@pytest.fixture
def make_machine(
    make_rig: Callable[..., Any], make_device: Callable[..., Any]
) -> Iterator[Callable[..., Machine]]:
    def make(slots: int = 5, *, seed: int = 0, staging: int = 0) -> Machine:
        device = torch_kernels.in_one_piece(make_device(seed), 1 << 23)
        rig = make_rig(
            "ram", device=device, layers=LAYERS, experts=EXPERTS, slots=slots, pages=1, top_k=TOP_K,
            staging=staging, least=TOP_K,
        )  # fmt: skip
        return Machine(rig, torch_kernels.TorchFetch(), slots)

    return make


def routes(tokens: int, seed: int, topic: int = 40) -> Iterator[list[list[int]]]:
    """Experts that are favourites for a while, then others."""
    rng = random.Random(seed)
    for number in range(tokens):
        if number % topic == 0:
            favour = [[rng.random() ** 3 for _ in range(EXPERTS)] for _ in range(LAYERS)]
        yield [sorted(range(EXPERTS), key=lambda e: -rng.random() * f[e])[:TOP_K] for f in favour]


def host_counts(slots: int, policy: str, tokens: int, seed: int) -> tuple[int, int]:
    """Hits and misses of the host's way."""
    cache = ExpertCache([slots] * LAYERS, policy)
    for chosen in routes(tokens, seed):
        for layer, experts in enumerate(chosen):
            for expert in cache.acquire(layer, experts).load:
                cache.complete(layer, expert)
            cache.release(layer, experts)
    return cache.stats.hits, cache.stats.misses


@pytest.mark.parametrize(
    ("policy", "slots"),
    [
        ("adaptive", 5),
        *(
            pytest.param(policy, slots, marks=pytest.mark.slow)
            for policy in ("lru", "lfu", "fifo")
            for slots in (TOP_K, 5, 9)
        ),
    ],
)
def test_every_token_finds_its_experts(make_machine: Callable[..., Machine], policy: str, slots: int) -> None:
    """Whatever the policy: the bytes are right, host and device agree, and nearly as much is hit."""
    machine, tokens, seed = make_machine(slots), 160, slots
    store = machine.store
    store.empty(policy)
    for number, chosen in enumerate(routes(tokens, seed)):
        machine.token(chosen)
        tally = store.tally()
        assert tally.hits + tally.misses == (number + 1) * LAYERS * TOP_K
        if number % 3 == 0:
            store.check_integrity()
    stats = store.snapshot()
    store.check_integrity()
    hits, misses = host_counts(slots, policy, tokens, seed)
    assert stats.hits + stats.misses == hits + misses
    # What the last token used stays for another one, which can only matter where slots are few.
    assert stats.misses <= 1.02 * misses + 2
    assert slots < 3 * TOP_K or abs(stats.misses - misses) <= 0.02 * misses + 2
    assert stats.bytes.h2d == 4096 * stats.misses
    assert stats.stall.demand == pytest.approx(1e-6 * stats.misses)
    assert stats.evictions == stats.misses - LAYERS * slots
    assert sum(map(sum, stats.routed.counts)) == tokens * LAYERS * TOP_K


def test_the_host_between_tokens_changes_nothing_for_the_device(make_machine: Callable[..., Machine]) -> None:
    """Other steps, prompts that leave something read ahead, prefetches under way, fewer slots or none at all,
    and tokens that come to no end: at any time."""
    machine, rng = make_machine(7, staging=2), random.Random(4)
    store, rig = machine.store, machine.rig
    for number, chosen in enumerate(routes(300, 9)):
        event = rng.random()
        if number in (120, 180):
            store.custody.release()
            before = store.slots(0)
            assert shrink(store.tier, rig.arena, 1 << 14, rig.device) > 0
            assert TOP_K <= store.slots(0) < before
        elif event < 0.1:
            rig.step(1, rng.sample(range(EXPERTS), 3))
        elif event < 0.15:
            store.custody.release()
            store.prefill.chunk = 40
            store.prefill.begin(1, 40)
            for layer in range(rng.randint(1, LAYERS)):
                rig.step(layer, range(10), recent=[3, 4, 5])
        elif event < 0.2:
            machine.token(chosen, layers=rng.randrange(LAYERS))
        elif event < 0.25:
            store.custody.release()
            store.prefetch(2, rng.sample(range(EXPERTS), 2), distance=1, budget_bytes=1 << 20)
        elif event < 0.28:
            store.empty()
        elif event < 0.31:
            store.snapshot()
        machine.token(chosen)
        if number % 2:
            store.check_integrity()
    store.check_integrity()
    assert store.tier.cache.staging.used == 0
    store.custody.release()
    rig.settle()


def test_a_token_that_came_to_no_end_is_counted_as_far_as_it_came(
    make_machine: Callable[..., Machine],
) -> None:
    machine = make_machine(5)
    store, chosen = machine.store, [[0, 1, 2]] * LAYERS
    machine.token(chosen, layers=2)
    tally = store.snapshot()
    assert (tally.hits_by_layer, tally.misses_by_layer) == ((0, 0, 0), (3, 3, 0))
    store.check_integrity()
    machine.token(chosen)
    machine.token(chosen, layers=0)
    machine.token(chosen)
    tally = store.snapshot()
    assert (tally.hits_by_layer, tally.misses_by_layer) == ((6, 6, 3), (3, 3, 3))
    assert tally.evictions == 0


@pytest.mark.parametrize("between", [False, True])
def test_what_an_earlier_time_wrote_down_is_not_taken_for_this_one(
    make_machine: Callable[..., Machine], between: bool
) -> None:
    """Each time counts its tokens from 1, and the first may come to no end as well."""
    machine = make_machine(5)
    store, chosen = machine.store, [[0, 1, 2]] * LAYERS
    machine.token(chosen)
    store.custody.release()
    if between:
        for layer in range(LAYERS):
            machine.rig.step(layer, [3, 4, 5, 6, 7])  # no slot is what it was
    before = store.snapshot()
    machine.token(chosen, layers=1)
    after = store.snapshot()
    hits, misses = (3, 0, 0), (0, 0, 0)
    if between:
        hits, misses = misses, hits
    for got, old, new in (
        (after.hits_by_layer, before.hits_by_layer, hits),
        (after.misses_by_layer, before.misses_by_layer, misses),
    ):
        assert tuple(now - then for now, then in zip(got, old, strict=True)) == new
    store.check_integrity()
    machine.token(chosen)
    store.check_integrity()


def test_what_the_last_token_used_stays(make_machine: Callable[..., Machine]) -> None:
    """The lists of the next token do not know of it yet, but the device does."""
    machine = make_machine(6)
    for first in (0, 3, 6, 9, 0, 3):
        machine.token([[first, first + 1, first + 2]] * LAYERS)
    assert machine.store.snapshot().hits == 0
    for _ in range(3):
        machine.token([[0, 1, 2]] * LAYERS)
        machine.token([[3, 4, 5]] * LAYERS)
    assert machine.store.snapshot().hits == 6 * LAYERS * TOP_K


def test_tables_that_disagree_are_found(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(5)
    machine.token([[0, 1, 2]] * LAYERS)
    machine.store.check_integrity()
    tables = machine.misses.tables.of[1]
    for table in (tables.slot_of, tables.expert_in):
        kept = int(table[0])
        table[0] = 4
        with pytest.raises(RuntimeError, match="layer 1 has"):
            machine.store.check_integrity()
        table[0] = kept
    machine.store.check_integrity()


def test_the_host_waits_for_nothing_but_the_log(make_machine: Callable[..., Machine]) -> None:
    """A token is given to the device without looking at what the one before did; its counts cost one look."""
    machine = make_machine(5)
    for chosen in routes(5, 1):
        machine.token(chosen)
    log = machine.misses._log
    assert log is not None
    assert not log.counted
    machine.store.tally()
    assert log.counted
    assert machine.store.tier.cache.stats.hits + machine.store.tier.cache.stats.misses == 5 * LAYERS * TOP_K
