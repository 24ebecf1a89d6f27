"""Simulates two tiers on recorded routes: VRAM over RAM over a disk."""

from __future__ import annotations

from typing import NamedTuple

from moe_local.cache.beside import Beside
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.replay import decode_steps, slots_by_layer
from moe_local.cache.routes import Routes


class TierRates(NamedTuple):
    """Loads per needed expert, in the second half of the decode steps."""

    copies: float
    """From RAM to VRAM."""
    reads: float
    """From disk to RAM."""


def replay_tiers(
    routes: Routes, above: int, below: int, policy: str = "adaptive", *, beside: bool = True
) -> TierRates:
    """Drive two caches with the decode steps of a recording; every load completes at once.

    The upper tier has `above` slots a layer, the lower one `below`. `beside=False`: the lower tier evicts
    regardless of what the upper one holds. Raises OptionError for an unknown policy and where a token needs
    more slots than `above`, RoutesError without decode steps.
    """
    steps = decode_steps(routes)
    made = Beside(policy, len(routes.layers))
    upper = ExpertCache(slots_by_layer(routes, above, least=routes.top_k), policy)
    lower = ExpertCache(slots_by_layer(routes, below, least=1), made if beside else policy)
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
