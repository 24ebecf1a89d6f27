"""The scheduler on a simulated machine whose true costs it can only measure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from moe_local.cache.keys import ExpertKey
from moe_local.offload.schedule.costs import Costs, Work
from moe_local.offload.schedule.scheduler import MissScheduler, Needed
from moe_local.offload.schedule.split import Machine, Missing, seconds
from support import simulated
from support.variants import others_slow

Make = Callable[..., Any]


class Case(NamedTuple):
    """A machine in GB/s, a model's experts and how often they are resident."""

    link: float
    cpu: float
    memory: float
    hit_rate: float
    top_k: int
    nbytes: int
    drift: float


SIZES = ((8, 2_650_000), (4, 13_000_000), (2, 99_000_000))
"""top-k and bytes an expert: Qwen3-30B-A3B, gpt-oss-120b, Mixtral 8x7B, in NF4 or about."""
FEW = [
    Case(link, min(cpu, memory), memory, hit_rate, *size, drift)
    for link, cpu, memory, hit_rate, size, drift in itertools.product(
        (4, 50), (15, 45), (50, 200), (0.5,), SIZES, (0.1,)
    )
]
MANY = [
    Case(link, min(cpu, memory), memory, hit_rate, *size, drift)
    for link, cpu, memory, hit_rate, size, drift in itertools.product(
        (4, 8, 12, 25, 50), (8, 15, 30, 45, 70), (50, 75, 100, 200), (0.0, 0.5, 0.8, 0.95), SIZES, (0.0, 0.1)
    )
]


def regret(case: Case, misses: int = 250, warm: int = 300) -> float:
    """By how much the time of the scheduler's splits exceeds the best ones', once `warm` layers had misses.

    So many layers are some ten tokens of a model. What the scheduler sees is noisy and drifts, and what it
    was told at first is up to 15 % wrong. What its decisions cost is counted without the noise: the luck of
    a layer is not the scheduler's.
    """
    truth = simulated.Truth(1e9 * case.cpu, 1e9 * case.link, 1e9 * case.memory)
    machine = simulated.SimulatedMachine(truth, simulated.Noise(1, drift=case.drift))
    rng = random.Random(str(case))
    costs = Costs(
        cpu={1: truth.cpu * rng.uniform(0.85, 1.15)},
        cpu_latency_s=truth.cpu_latency_s,
        link=truth.link * rng.uniform(0.85, 1.15),
        link_latency_s=truth.link_latency_s,
        memory=truth.memory * rng.uniform(0.85, 1.15),
        gpu=truth.gpu,
    )
    scheduler = MissScheduler("auto", costs, machine.clock)
    scheduler.worth.hits = 0.0  # misses come by chance here: a slot is worth nothing
    machine.watch = scheduler
    work, took, best, seen = Work(case.nbytes, 1), 0.0, 0.0, 0
    for step in itertools.count():
        hits = sum(rng.random() < case.hit_rate for _ in range(case.top_k))
        missed = case.top_k - hits
        machine.poll()
        if not missed:
            simulated.run_layer(machine, hits, case.nbytes, [], 0)
            continue
        machine.noise.begin(step)
        needed = [Needed(ExpertKey(step, expert), work) for expert in range(missed)]
        chosen = scheduler.split(needed, [work] * hits)
        if seen >= warm:
            options = [expected(machine, case, missed, count) for count in range(missed + 1)]
            took, best = took + options[len(chosen.cpu)], best + min(options)
        seen += 1
        if seen == warm + misses:
            return took / best - 1
        copies = [machine.issue(ExpertKey(step, m.expert), case.nbytes) for m in chosen.link]
        scheduler.began()
        span = simulated.run_layer(machine, hits, case.nbytes, copies, len(chosen.cpu))
        if span:
            scheduler.computed([work] * len(chosen.cpu), *span)
    raise AssertionError


def expected(machine: Any, case: Case, missed: int, on_cpu: int) -> float:
    """What a layer takes now, but for noise."""
    truth, noise = machine.truth, machine.noise
    gpu = case.nbytes / (0.85 * truth.gpu)
    cpu = case.nbytes / truth.cpu * noise.wave("cpu", machine.now)
    copy = truth.link_latency_s + case.nbytes / truth.link * noise.wave("link", machine.now)
    each = [Missing(expert, cpu, copy, gpu) for expert in range(missed)]
    slowdown = max(1.0, (truth.cpu + truth.link) / truth.memory)
    now = Machine((case.top_k - missed) * gpu, 0.0, truth.cpu_latency_s, slowdown, slowdown)
    return seconds(each[:on_cpu], each[on_cpu:], now) + truth.dense_s


def test_is_within_three_percent_of_the_optimum() -> None:
    found = sorted((regret(case), case) for case in FEW)
    assert found[-1][0] < 0.03, found[-3:]
    assert sum(excess for excess, _ in found) / len(found) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_fine_grid(size: tuple[int, int]) -> None:
    """Of 2400 cases five were above 3 % when this was written, the worst at 6.2 %: three where CPU and
    link ask for 1.6 times what the memory gives or more, so that no split is much better than another, and
    two where the machine drifts by a tenth within a hundred layers."""
    found = sorted((regret(case), case) for case in MANY if case.top_k == size[0])
    print([(round(excess, 4), *case) for excess, case in found[-8:]])
    assert sum(excess >= 0.03 for excess, _ in found) <= len(found) / 200
    assert found[-1][0] < 0.07


LOCALITIES = [(0.0, 0.0), (0.9, 0.0), (0.5, 1.0)]
"""The share of a layer's experts that the next token needs again, and the skew of the others' popularity."""


@pytest.mark.parametrize(("stay", "skew"), others_slow(LOCALITIES, LOCALITIES[:1]))
def test_a_cache_that_learns(make_rig: Make, stay: float, skew: float) -> None:
    """The real store on a simulated device: auto against both others with a cache that is changed by them.

    A split that is best for its layer may leave a cache that is worse for the next, and the other way
    round; over many machines that comes out even.
    """
    ratios = []
    for link_s, memory in itertools.product((0.6, 1.2, 2.5), (0.6, 1.0)):
        took = {mode: decode(make_rig, mode, link_s, memory, stay, skew) for mode in ("fetch", "cpu", "auto")}
        ratios.append(took["auto"] / min(took["fetch"], took["cpu"]))
    assert max(ratios) < 1.1, ratios
    assert sum(ratios) / len(ratios) < 1.0, ratios


def decode(make_rig: Make, mode: str, link_s: float, memory: float, stay: float, skew: float) -> float:
    """Seconds of the second half of the tokens, 4 of 16 experts a layer, where the CPU takes 1 s for one.

    `link_s`: seconds of a copy. `memory`: what it gives, of what CPU and link together could take.
    """
    nbytes, layers, experts, top_k, tokens = 4096, 2, 16, 4, 120
    cpu, link = nbytes / 1.0, nbytes / link_s
    truth = simulated.Truth(cpu, link, max(cpu, memory * (cpu + link)), nbytes / 0.03, 0.05, 0.02, 0.2)
    machine = simulated.SimulatedMachine(truth, simulated.Noise(3, outliers=0.0))
    scheduler = None
    if mode != "fetch":
        costs = Costs(
            cpu={1: 1.1 * cpu},
            cpu_latency_s=0.05,
            link=0.9 * link,
            link_latency_s=0.02,
            memory=truth.memory,
            gpu=truth.gpu,
        )
        scheduler = MissScheduler(mode, costs, machine.clock)
    device = simulated.SimulatedDevice(machine)
    rig = make_rig(
        "ram", layers=layers, experts=experts, slots=6, pages=1, device=device, scheduler=scheduler
    )
    rng = random.Random(5)
    weights = [1 / (1 + expert) ** skew for expert in range(experts)]
    last = [rng.sample(range(experts), top_k) for _ in range(layers)]
    half = 0.0
    for token in range(tokens):
        half = machine.now if token == tokens // 2 else half
        for layer in range(layers):
            machine.noise.begin(token * layers + layer)
            chosen = dict.fromkeys(expert for expert in last[layer] if rng.random() < stay)
            while len(chosen) < top_k:
                chosen[rng.choices(range(experts), weights)[0]] = None
            last[layer] = list(chosen)
            start = machine.now
            for group in rig.serve(layer, last[layer]):
                if group[0].on_host:
                    machine.compute(nbytes * len(group))
                    continue
                for lease in group:
                    rig.check_lease(layer, lease)
            device.drain(start)
            machine.sleep_until(machine.now + truth.dense_s)
    rig.check()
    return float(machine.now - half)
