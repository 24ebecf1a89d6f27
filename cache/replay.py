"""Simulates a cache on recorded routes, without weights or a GPU, in seconds for a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from moe_local.cache.belady import BeladyPolicy, hits_with_bypass
from moe_local.cache.errors import OptionError, RoutesError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.policy import EvictionPolicy
from moe_local.cache.routes import Phase, Routes, RouteStep
from moe_local.cache.stats import Stats


class Replay(NamedTuple):
    """Counts of one cache over two ranges of decode steps (`tokens` of them); times and bytes are 0."""

    cold: Stats
    """All decode steps, from an empty cache."""
    steady: Stats
    """The second half of the decode steps."""


class HitRates(NamedTuple):
    """Hits per needed expert, over the same ranges as in `Replay`."""

    cold: float
    steady: float


def replay(
    routes: Routes,
    slots: int | Sequence[int],
    policy: str | Callable[[], EvictionPolicy] = "lru",
    *,
    one_by_one: bool = False,
) -> Replay:
    """Drive an `ExpertCache` with the decode steps of a recording; every load completes at once.

    `slots` per layer, or one number for all; `policy` as for `ExpertCache`, or "belady", the optimum.
    `one_by_one` looks a step's experts up one after the other, so that one may evict the next: the plain LRU
    of published simulations, 0 to 10 points worse. Raises OptionError for an unknown policy and when a token
    needs more slots than there are, RoutesError without decode steps.
    """
    steps = decode_steps(routes)
    counts = slots_by_layer(routes, slots, least=1 if one_by_one else routes.top_k)
    if policy == "belady":
        policy = iter([BeladyPolicy(needs) for needs in _needs(routes, steps, one_by_one)]).__next__
    cache = ExpertCache(counts, policy, sizes=lambda layer, expert: routes.layers[layer].expert)
    half = len(steps) // 2
    _drive(cache, steps[:half], one_by_one)
    middle = cache.stats.snapshot(tokens=half)
    _drive(cache, steps[half:], one_by_one)
    cold = cache.stats.snapshot(tokens=len(steps))
    return Replay(cold, cold - middle)


def optimum_with_bypass(routes: Routes, slots: int | Sequence[int]) -> HitRates:
    """The best hit rates of caches that need not admit the experts a step uses; raises as `replay` does.

    No eviction policy can reach them, since policies do not decide about admission.
    """
    steps = decode_steps(routes)
    counts = slots_by_layer(routes, slots, least=routes.top_k)
    half, hits, needed = len(steps) // 2, [0, 0], [0, 0]
    for layer, needs in enumerate(_needs(routes, steps, one_by_one=False)):
        # The halves are those of the recording, and a layer may be missing from some of its steps.
        first = sum(route.layer == layer for step in steps[:half] for route in step.layers)
        by_step = hits_with_bypass(needs, counts[layer])
        for part, start in enumerate((0, first)):
            hits[part] += sum(by_step[start:])
            needed[part] += sum(map(len, needs[start:]))
    return HitRates(hits[0] / needed[0], hits[1] / needed[1])


def decode_steps(routes: Routes) -> list[RouteStep]:
    """The decode steps of a recording. Raises RoutesError if there are none."""
    steps = list(routes.phase(Phase.DECODE))
    if not steps:
        raise RoutesError(f"the recording of {routes.model} has no decode steps to replay")
    return steps


def slots_by_layer(routes: Routes, slots: int | Sequence[int], least: int) -> list[int]:
    """The slots of each layer; a single number holds for all. Raises OptionError for fewer than `least`."""
    counts = [slots] * len(routes.layers) if isinstance(slots, int) else list(slots)
    if len(counts) != len(routes.layers):
        raise OptionError(f"slots for {len(counts)} layers; the recording has {len(routes.layers)}")
    if min(counts, default=least) < least:
        raise OptionError(
            f"{min(counts)} slots per layer are too few for this recording; give {least} or more"
        )
    return counts


def _needs(routes: Routes, steps: Iterable[RouteStep], one_by_one: bool) -> list[list[Sequence[int]]]:
    """For each layer, the experts that each call of `acquire` will ask for."""
    needs: list[list[Sequence[int]]] = [[] for _ in routes.layers]
    for step in steps:
        for route in step.layers:
            needs[route.layer] += _calls(route.experts, one_by_one)
    return needs


def _calls(experts: Sequence[int], one_by_one: bool) -> list[Sequence[int]]:
    return [(expert,) for expert in experts] if one_by_one else [experts]


def _drive(cache: ExpertCache, steps: Iterable[RouteStep], one_by_one: bool) -> None:
    for step in steps:
        for route in step.layers:
            for experts in _calls(route.experts, one_by_one):
                for expert in cache.acquire(route.layer, experts).load:
                    cache.complete(route.layer, expert)
                cache.release(route.layer, experts)
