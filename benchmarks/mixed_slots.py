"""What does it cost a cache that experts of several sizes need slots of several sizes?

Method. The decode steps of a recording drive the product's cache, policies and slot ladders, as replay.py
does, with experts of four sizes (BITS, SHARES). Sizes are assigned either by `chance`, or by `use`: the more
an expert was needed in the first half, the more bits it gets, with some noise. All caches have the same
bytes, a share of those of all experts. Figures are the hit rate in bytes: the share of needed bytes that were
resident.
  packed     experts fill memory without gaps, whatever is evicted: no real cache does that without copying
  ladder     the product: slot sizes chosen by the use in the first half of the recording
  unknown    the product if use is unknown: slot sizes in proportion to the number of experts
  largest    every slot is as large as the largest expert
  waves      steps of `ladder` in a thousand that did not find room for all of their experts at once

Run: python benchmarks/mixed_slots.py --routes FILE [--layers 16] [--policy adaptive] [--json]
Prints a table; with --json that goes to stderr, and one array to stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from statistics import mean

from moe_local.cache.errors import MoeLocalError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.ladder import slot_ladder
from moe_local.cache.policies import POLICIES, policy_for
from moe_local.cache.routes import Phase, Routes, read_routes

BITS = (825, 413, 320, 220)
"""Sizes of experts in int8, nf4, and formats of three and two bits."""
SHARES = (0.1, 0.4, 0.3, 0.2)
BUDGETS = (0.15, 0.3, 0.5)
NOISE = 15.0
"""Standard deviation of the noise that is added to an expert's rank by use, in ranks."""

Steps = Sequence[Sequence[int]]


def steps_by_layer(routes: Routes, layers: int) -> list[Steps]:
    """For each of the first `layers` layers, the experts that each decode step needs."""
    found: list[list[Sequence[int]]] = [[] for _ in routes.layers]
    for step in routes.phase(Phase.DECODE):
        for route in step.layers:
            found[route.layer].append(route.experts)
    return list(found[:layers])


def use_of(steps: Steps, experts: int) -> tuple[int, ...]:
    """How often each expert was needed in the first half."""
    counts = Counter(expert for step in steps[: len(steps) // 2] for expert in step)
    return tuple(counts[expert] for expert in range(experts))


def sizes_of(use: Sequence[int], by_use: bool, seed: int) -> tuple[int, ...]:
    """The size of each expert."""
    chance = random.Random(seed)
    order = sorted(range(len(use)), key=lambda expert: -use[expert])
    noise = NOISE if by_use else 1e9
    ranks = sorted(range(len(use)), key=lambda expert: order.index(expert) + chance.gauss(0, noise))
    ends = [round(len(use) * share) for share in accumulate(SHARES)]
    sizes = [0] * len(use)
    for rank, expert in enumerate(ranks):
        sizes[expert] = next((b for b, end in zip(BITS, ends, strict=True) if rank < end), BITS[-1])
    return tuple(sizes)


def packed(steps: Steps, sizes: Sequence[int], budget: float, policy: str) -> float:
    """The hit rate in bytes of a cache that only counts bytes."""
    order, there, used, found, needed = policy_for(policy)(), set[int](), 0, 0, 0
    for step in steps:
        absent = [expert for expert in step if expert not in there]
        needed += sum(sizes[expert] for expert in step)
        found += sum(sizes[expert] for expert in step if expert in there)
        order.touch(step, absent)
        used += sum(sizes[expert] for expert in absent)
        for victim in list(order.coldest()) if used > budget else ():
            if victim not in step:
                order.remove(victim)
                there.remove(victim)
                used -= sizes[victim]
                if used <= budget:
                    break
        for expert in absent:
            order.insert(expert)
            there.add(expert)
    return found / needed


def slotted(steps: Steps, sizes: Sequence[int], ladder: Sequence[int], policy: str) -> tuple[float, float]:
    """The hit rate in bytes of the product's cache, and the share of steps that went in waves."""
    cache = ExpertCache([len(ladder)], policy, lambda layer, e: sizes[e], slot_sizes=[ladder])
    found = needed = waves = 0
    for step in steps:
        needed += sum(sizes[expert] for expert in step)
        found += sum(sizes[expert] for expert in step if cache.is_resident(0, expert))
        waves += not cache.fits(0, step)
        todo = sorted(step, key=lambda expert: cache.slot_of(0, expert) is None)
        if not cache.shortage(0, step):
            todo = list(step)
        while todo:
            wave = todo[: len(ladder)]
            while cache.shortage(0, wave):
                wave.pop()
            for expert in cache.acquire(0, wave).load:
                cache.complete(0, expert)
            cache.release(0, wave)
            todo = todo[len(wave) :]
    return found / needed, waves / len(steps)


def prefix(ladder: Sequence[int], budget: float, least: int) -> Sequence[int]:
    """The first slots of a ladder that fit into `budget` bytes, but at least `least` slots."""
    count = sum(end <= budget for end in accumulate(ladder))
    return ladder[: max(count, least)]


def measure(layers: Sequence[Steps], experts: int, top_k: int, policy: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for by_use in (False, True):
        for share in BUDGETS:
            found: dict[str, list[float]] = {}
            for layer, steps in enumerate(layers):
                use = use_of(steps, experts)
                sizes = sizes_of(use, by_use, seed=layer)
                budget = share * sum(sizes)
                known, waves = slotted(
                    steps, sizes, prefix(slot_ladder(sizes, top_k, use), budget, 1), policy
                )
                alike = prefix(slot_ladder(sizes, top_k), budget, 1)
                largest = prefix((max(sizes),) * experts, budget, top_k)
                for name, value in (
                    ("packed", packed(steps, sizes, budget, policy)),
                    ("ladder", known),
                    ("unknown", slotted(steps, sizes, alike, policy)[0]),
                    ("largest", slotted(steps, sizes, largest, policy)[0]),
                    ("waves", 1000 * waves),
                ):
                    found.setdefault(name, []).append(value)
            means = {name: mean(values) for name, values in found.items()}
            rows.append({"bits": "use" if by_use else "chance", "share": share, **means})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--routes", required=True, metavar="FILE", help="a recording (route_trace v1)")
    parser.add_argument("--layers", type=int, default=16, help="of the first of them")
    parser.add_argument("--policy", default="adaptive", choices=list(POLICIES))
    parser.add_argument("--json", action="store_true", help="exactly one JSON array on stdout")
    options = parser.parse_args(arguments)
    try:
        routes = read_routes(options.routes)
    except MoeLocalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    layers = steps_by_layer(routes, options.layers)
    rows = measure(layers, routes.num_experts, routes.top_k, options.policy)
    file = sys.stderr if options.json else sys.stdout
    print(f"{routes.model}, {options.policy}: share of needed bytes that were there", file=file)
    columns = ("packed", "ladder", "unknown", "largest", "waves")
    print(f"{'bits by':8} {'bytes':>6} " + " ".join(f"{name:>8}" for name in columns), file=file)
    for row in rows:
        figures = " ".join(f"{row[name]:8.3f}" for name in columns)
        print(f"{row['bits']:8} {row['share']:6.0%} {figures}", file=file)
    if options.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
