"""What two tiers would have made of recorded routes: VRAM over RAM over a disk."""

from __future__ import annotations

from typing import NamedTuple

from moe_local.cache.beside import Beside
from moe_local.cache.errors import RoutesError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.routes import Phase, Routes


class TierRates(NamedTuple):
    """Per expert needed, in the second half of the decode steps."""

    copies: float
    """From RAM to VRAM."""
    reads: float
    """From disk to RAM."""


def replay_tiers(
    routes: Routes, above: int, below: int, policy: str = "adaptive", *, beside: bool = True
) -> TierRates:
    """Drive two caches with the decode steps of a recording; every load ends at once.

    `above` slots a layer over `below`. `beside=False`: the lower tier does not mind what the upper one has.
    Raises OptionError for an unknown policy, RoutesError without decode steps.
    """
    steps = list(routes.phase(Phase.DECODE))
    if not steps:
        raise RoutesError(f"the recording of {routes.model} has no decode steps to replay")
    layers = len(routes.layers)
    made = Beside(policy, layers)
    upper = ExpertCache([above] * layers, policy)
    lower = ExpertCache([below] * layers, made if beside else policy)
    made.above = upper
    copies = reads = needed = 0
    for number, step in enumerate(steps):
        if number == len(steps) // 2:
            copies = reads = needed = 0
        for route in step.layers:
            layer, needed = route.layer, needed + len(route.experts)
            for expert in upper.acquire(layer, route.experts).load:
                for read in lower.acquire(layer, [expert]).load:
                    lower.complete(layer, read)
                    reads += 1
                lower.release(layer, [expert])
                upper.complete(layer, expert)
                copies += 1
            upper.release(layer, route.experts)
    return TierRates(copies / needed, reads / needed)
