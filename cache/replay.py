"""What a cache would have made of recorded routes: no weights, no GPU, seconds for a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from moe_local.cache.errors import OptionError, RoutesError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.policy import EvictionPolicy
from moe_local.cache.routes import Phase, Routes, RouteStep
from moe_local.cache.stats import Stats


class Replay(NamedTuple):
    """Counts of the same cache over two stretches; `tokens` are its decode steps, time and bytes are 0."""

    cold: Stats
    """All decode steps, from an empty cache."""
    steady: Stats
    """The second half of them."""


def replay(
    routes: Routes,
    slots: int | Sequence[int],
    policy: str | Callable[[], EvictionPolicy] = "lru",
    *,
    one_by_one: bool = False,
) -> Replay:
    """Drive an `ExpertCache` with the decode steps of a recording; every load ends at once.

    `slots` per layer, or one number for all. `one_by_one` looks a step's experts up one after the other,
    so that one may evict the next: the plain LRU of published simulations, 0 to 10 points worse.
    Raises OptionError when a token needs more slots than there are, RoutesError without decode steps.
    """
    counts = [slots] * len(routes.layers) if isinstance(slots, int) else list(slots)
    if len(counts) != len(routes.layers):
        raise OptionError(f"slots for {len(counts)} layers; the recording has {len(routes.layers)}")
    least = 1 if one_by_one else routes.top_k
    if min(counts, default=least) < least:
        raise OptionError(
            f"{min(counts)} slots per layer are too few for this recording; give {least} or more"
        )
    steps = list(routes.phase(Phase.DECODE))
    if not steps:
        raise RoutesError(f"the recording of {routes.model} has no decode steps to replay")
    cache = ExpertCache(counts, policy, sizes=lambda layer, expert: routes.layers[layer].expert)
    half = len(steps) // 2
    _drive(cache, steps[:half], one_by_one)
    middle = cache.stats.snapshot(tokens=half)
    _drive(cache, steps[half:], one_by_one)
    cold = cache.stats.snapshot(tokens=len(steps))
    return Replay(cold, cold - middle)


def _drive(cache: ExpertCache, steps: Iterable[RouteStep], one_by_one: bool) -> None:
    for step in steps:
        for route in step.layers:
            groups = [(expert,) for expert in route.experts] if one_by_one else [route.experts]
            for experts in groups:
                for expert in cache.acquire(route.layer, experts).load:
                    cache.complete(route.layer, expert)
                cache.release(route.layer, experts)
