"""Figures from samples that can be added up by hand."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from moe_local.cache.stats import BytesMoved, PrefetchStats, StallSeconds, Stats
from moe_local.offload.measure.figures import hit_rates, percentile, timeline, times
from moe_local.offload.measure.floor import Floor, Weights
from moe_local.offload.measure.sample import Sample, Step
from moe_local.offload.plan.bandwidth import Bandwidths


def step(ms: float, hits: int, misses: int, disk_s: float = 0.0, cpu_s: float = 0.0) -> Step:
    counts = Stats(
        hits_by_layer=(hits, 0),
        misses_by_layer=(misses, 0),
        bytes=BytesMoved(disk=100 * misses),
        stall=StallSeconds(disk=disk_s, cpu=cpu_s),
        prefetch=PrefetchStats(issued=4, used=3, late=1, wasted_bytes=7),
    )
    return Step(ms, counts)


def sample(*steps: Step, ttft_s: float = 0.5, prompt: int = 10) -> Sample:
    return Sample(prompt, [ttft_s], ttft_s, [s.ms for s in steps], list(steps), [(1, 2)])


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_percentiles_are_those_of_everyone_else(count: int) -> None:
    values = [random.Random(count).lognormvariate(0, 1) for _ in range(count)]
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    for share in (1, 50, 95, 99):
        assert percentile(values, share / 100) == pytest.approx(hundredths[share - 1])
    assert (percentile(values, 0), percentile(values, 1)) == (min(values), max(values))


def test_the_parts_of_a_token_are_its_time() -> None:
    figures = times(
        [
            sample(step(10, 2, 0), step(30, 0, 2, disk_s=0.012), ttft_s=0.2),
            sample(step(20, 1, 1, disk_s=0.004, cpu_s=0.002), ttft_s=0.4, prompt=30),
        ]
    )
    assert figures["tpot_ms"]["mean"] == pytest.approx(20)
    assert figures["stall_ms_per_token"] == {
        "demand": 0.0,
        "late_prefetch": 0.0,
        "disk": pytest.approx(16 / 3),
        "cpu": pytest.approx(2 / 3),
        "sync": 0.0,
    }
    assert figures["other_ms_per_token"] == pytest.approx(20 - 18 / 3)
    assert figures["tokens_per_s"]["decode"] == pytest.approx(50)
    assert figures["tokens_per_s"]["prefill"] == pytest.approx(statistics.median([10 / 0.2, 30 / 0.4]))
    assert figures["ttft_s"] == pytest.approx(0.3)
    assert figures["bytes_per_token"] == {"h2d": 0, "disk": 100}
    prefetch = {"issued": 12, "used": 9, "late": 3, "wasted_bytes": 21, "misses_covered": 9 / (9 + 3)}
    assert figures["prefetch"].items() >= prefetch.items()
    assert figures["hit_rate_timed"] == 0.5


def test_steady_is_the_second_half_of_cold() -> None:
    rates = hit_rates(sample(step(1, 0, 2), step(1, 0, 2), step(1, 1, 1), step(1, 2, 0)))
    assert (rates["cold"], rates["steady"], rates["decode_steps"]) == (3 / 8, 3 / 4, 4)
    assert rates["by_layer"] == [3 / 8, None]
    line = timeline(sample(step(5, 1, 1, disk_s=0.002)))
    assert line == [{"ms": 5, "stall_ms": {"disk": 2.0}, "hits": 1, "misses": 1}]


def test_the_slowest_tier_decides_the_floor() -> None:
    floor = Floor(Weights(6_000, 12_000, 4_000, 2_000), "ram", Bandwidths(ram=1e6, disk=1e5, h2d=5e5))
    assert floor.ms_per_token == pytest.approx(10)
    assert floor.with_misses(BytesMoved(disk=1_000)) == pytest.approx(10)
    assert floor.with_misses(BytesMoved(disk=2_000)) == pytest.approx(20)
    assert floor.with_misses(BytesMoved(disk=2_000), from_storage=0.25) == pytest.approx(10)
    assert floor.with_misses(BytesMoved(h2d=10_000)) == pytest.approx(20)
    document: dict[str, Any] = floor.to_dict()
    assert document["bytes_per_token"] == {"experts": 6_000, "dense": 4_000}
