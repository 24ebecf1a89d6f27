"""What an expert's bytes cost in time where not all experts are resident."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_local.offload.allocation.sensitivity import Sensitivity
from moe_local.offload.plan.estimate import hit_rate

if TYPE_CHECKING:
    from moe_local.offload.plan.plan import Plan

TIME_FOR_HARM = 5.0
"""The slowdown, as a natural logarithm, that weighs as much as one nat of harm: 5 % of time for 1 % of
perplexity."""


@dataclass(frozen=True, slots=True)
class MissCost:
    """Converts fetched bytes into harm that weighs as much."""

    per_byte: float
    """Nats that one fetched byte per token weighs as much as."""
    resident_share: float
    """Share of the experts that are in the fastest tier."""

    @classmethod
    def of(cls, token_seconds: float, bytes_per_second: float, resident_share: float) -> MissCost:
        """For tokens that take `token_seconds` each and fetch misses at `bytes_per_second`."""
        return cls(1 / (bytes_per_second * token_seconds * TIME_FOR_HARM), resident_share)

    @classmethod
    def of_plan(cls, plan: Plan) -> MissCost | None:
        """For the speeds that a plan expects; None where nothing is missed or no speed is known."""
        if plan.mode in (None, "resident") or plan.tokens_per_s is None:
            return None
        return cls.of(1 / plan.tokens_per_s, plan.missed_bytes_per_s, plan.resident_fraction)

    def costs(self, sensitivity: Sensitivity, layer: int) -> list[float]:
        """The cost per byte of each of a layer's experts, in the unit of the Sensitivity's harm."""
        uses = [sensitivity.layers[layer].use(e) for e in range(len(sensitivity.layers[layer].uses))]
        per_byte = self.per_byte / sensitivity.nats
        found = zip(uses, hits(uses, self.resident_share), strict=True)
        return [per_byte * use * (1 - hit) for use, hit in found]


def hits(uses: Sequence[float], share: float) -> tuple[float, ...]:
    """How often each expert is resident when it is needed, if a cache holds `share` of a layer's experts.

    The average is the hit rate known from real models (`estimate.hit_rate`). The experts' own rates follow
    Che's approximation of an LRU cache: an expert used at rate u is resident with probability 1 - exp(-u T),
    where T is how long an unused expert stays in the cache (Che, Tung, Wang 2002).
    """
    wanted, total = hit_rate(share, len(uses)), math.fsum(uses)
    if wanted >= 1 or not total:
        return (min(1.0, wanted),) * len(uses)

    def average(stays: float) -> float:
        return math.fsum(use * -math.expm1(-use * stays) for use in uses) / total

    low, high = 0.0, 1.0
    while average(high) < wanted and high < 1e12:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) < wanted else (low, middle)
    return tuple(-math.expm1(-use * high) for use in uses)
