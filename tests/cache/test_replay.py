from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path

import pytest

from moe_local.cache.errors import OptionError, RoutesError
from moe_local.cache.replay import optimum_with_bypass, replay
from moe_local.cache.routes import LayerBytes, LayerRoute, Phase, Routes, RouteStep, read_routes, write_routes


def _route(layer: int, *experts: int) -> LayerRoute:
    count = len(experts)
    return LayerRoute(layer, experts, (1 / count,) * count, (False,) * count, (0,) * count)


def _routes(*decode: tuple[int, ...], layers: int = 1) -> Routes:
    """A recording that chooses the same experts in each layer, after a prompt that must not count."""
    steps = [RouteStep(0, Phase.PREFILL, 0, tuple(_route(layer, 0, 1) for layer in range(layers)))]
    for number, experts in enumerate(decode, 1):
        chosen = tuple(_route(layer, *experts) for layer in range(layers))
        steps.append(RouteStep(0, Phase.DECODE, number, chosen))
    return Routes("tiny", "mixtral", 8, 2, (LayerBytes(100, 7),) * layers, tuple(steps))


@pytest.fixture(scope="module")
def qwen3(repository: Path) -> Routes:
    path = repository.parent / "shared" / "data" / "routes" / "qwen3-30b-a3b_top6.csv"
    if not path.exists():
        pytest.skip(f"recorded routes are not at {path}")
    return read_routes(path)


@pytest.fixture(scope="module", params=["qwen3-30b-a3b_top6.csv", "gemma-4-26b-a4b_top6.csv"])
def recorded(request: pytest.FixtureRequest, repository: Path) -> Routes:
    path = repository.parent / "shared" / "data" / "routes" / request.param
    if not path.exists():
        pytest.skip(f"recorded routes are not at {path}")
    return read_routes(path)


def test_cold_counts_every_decode_step_and_steady_the_second_half() -> None:
    result = replay(_routes((0, 1), (0, 2), (0, 2), (0, 1)), slots=2)
    assert (result.cold.hits, result.cold.misses, result.cold.evictions) == (4, 4, 2)
    assert (result.steady.hits, result.steady.misses, result.steady.evictions) == (3, 1, 1)
    assert (result.cold.tokens, result.steady.tokens) == (4, 2)


def test_one_by_one_may_evict_what_the_step_still_needs() -> None:
    routes = _routes((0, 1), (2, 0))
    assert replay(routes, slots=2).cold.hits == 1
    assert replay(routes, slots=2, one_by_one=True).cold.hits == 0


def test_slots_may_differ_by_layer() -> None:
    result = replay(_routes((0, 1), (2, 3), (0, 1), layers=2), slots=[2, 4])
    assert result.cold.hits_by_layer == (0, 2)


def test_what_cannot_be_replayed() -> None:
    routes = _routes((0, 1), layers=2)
    with pytest.raises(OptionError, match="1 slots per layer are too few for this recording; give 2 or more"):
        replay(routes, slots=1)
    with pytest.raises(OptionError, match="slots for 3 layers; the recording has 2"):
        replay(routes, slots=[2, 2, 2])
    with pytest.raises(RoutesError, match="tiny has no decode steps"):
        replay(_routes(), slots=2)


def _slow_lru_hits(steps: list[tuple[int, ...]], slots: int) -> int:
    """Look up together, touch the hits, admit the rest; written as plainly as it can be."""
    order: list[int] = []
    hits = 0
    for experts in steps:
        present = [e for e in experts if e in order]
        hits += len(present)
        order = [e for e in order if e not in present] + present
        for expert in experts:
            if expert not in order:
                if len(order) == slots:
                    order.remove(next(e for e in order if e not in experts))
                order.append(expert)
    return hits


def test_lru_is_as_a_plain_one() -> None:
    chance = random.Random(5)
    steps = [tuple(chance.sample(range(8), 2)) for _ in range(200)]
    for slots in (2, 3, 5, 8):
        assert replay(_routes(*steps), slots).cold.hits == _slow_lru_hits(steps, slots)


@pytest.mark.parametrize(
    ("slots", "cold", "steady"),
    [
        (6, 0.275, 0.270),
        (8, 0.382, 0.371),
        (16, 0.586, 0.581),
        (24, 0.712, 0.711),
        (32, 0.800, 0.809),
        (48, 0.888, 0.922),
        (64, 0.912, 0.960),
    ],
)
def test_reproduces_the_published_lru_of_qwen3(qwen3: Routes, slots: int, cold: float, steady: float) -> None:
    """Plain LRU, one lookup at a time, of BigMoeOnEdge's Qwen3-30B-A3B recording at top-6."""
    result = replay(qwen3, slots, one_by_one=True)
    assert result.cold.hit_rate == pytest.approx(cold, abs=0.00051)
    assert result.steady.hit_rate == pytest.approx(steady, abs=0.00051)


@pytest.mark.parametrize("slots", [6, 16, 48])
def test_looking_up_a_step_together_is_better(qwen3: Routes, slots: int) -> None:
    together = replay(qwen3, slots).cold
    one_by_one = replay(qwen3, slots, one_by_one=True).cold
    assert together.hits > one_by_one.hits
    by_layer: OrderedDict[int, list[tuple[int, ...]]] = OrderedDict()
    for step in qwen3.phase(Phase.DECODE):
        for route in step.layers:
            by_layer.setdefault(route.layer, []).append(route.experts)
    assert together.hits_by_layer == tuple(_slow_lru_hits(steps, slots) for steps in by_layer.values())


def test_frequency_beats_recency_beats_nothing_on_a_small_cache(qwen3: Routes) -> None:
    lfu, lru, fifo = (replay(qwen3, 16, policy).cold.hits for policy in ("lfu", "lru", "fifo"))
    assert lfu > lru > fifo


def test_the_adaptive_policy_closes_a_quarter_of_the_gap(recorded: Routes) -> None:
    """Between LRU and the optimum, at 12.5 and 25 % of the experts; and the optimum is one."""
    for slots in (16, 32):
        done = [replay(recorded, slots, policy) for policy in ("lru", "adaptive", "belady")]
        for lru, adaptive, best in (
            [result.cold.hits for result in done],
            [result.steady.hits for result in done],
        ):
            assert lru + (best - lru) / 4 <= adaptive <= best
        bypass = optimum_with_bypass(recorded, slots)
        assert bypass.cold > (done[2].cold.hit_rate or 1)
        assert bypass.steady > (done[2].steady.hit_rate or 1)


@pytest.mark.parametrize("slots", [8, 24, 48, 64])
def test_the_adaptive_policy_is_no_worse_than_lru_on_recordings(recorded: Routes, slots: int) -> None:
    lru, adaptive = (replay(recorded, slots, policy) for policy in ("lru", "adaptive"))
    assert adaptive.cold.hits >= lru.cold.hits
    assert adaptive.steady.hits >= lru.steady.hits


def test_the_optimum_one_by_one_and_over_missing_layers() -> None:
    """The last layer of a recording may be missing from some steps."""
    routes = _routes((0, 1), (2, 0), (0, 1), layers=2)
    last = routes.steps[2]
    steps = (*routes.steps[:2], last._replace(layers=last.layers[:1]), *routes.steps[3:])
    routes = Routes("tiny", "mixtral", 8, 2, routes.layers, steps)
    assert replay(routes, 2, "belady").cold.hits == 1 + 1 + 2
    assert replay(routes, 2, "belady", one_by_one=True).cold.hits >= 4
    assert optimum_with_bypass(routes, 2) == (5 / 10, 5 / 6)


def test_a_recording_survives_being_written(qwen3: Routes, repository: Path, tmp_path: Path) -> None:
    """The same lines, though in the order of steps; and read again the same routes."""
    write_routes(tmp_path / "copy.csv", qwen3)
    assert read_routes(tmp_path / "copy.csv") == qwen3
    original = repository.parent / "shared" / "data" / "routes" / "qwen3-30b-a3b_top6.csv"
    copied = (tmp_path / "copy.csv").read_text().splitlines()
    assert sorted(copied) == sorted(original.read_text().splitlines())
