"""What the bytes of an expert cost in time, where not all experts are resident."""

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
"""How much slower, as a natural logarithm, one nat of harm is worth: for 1 % of perplexity, 5 % of time."""


@dataclass(frozen=True, slots=True)
class MissCost:
    """Turns bytes that are fetched into harm."""

    per_byte: float
    """Nats that one fetched byte a token is worth."""
    resident_share: float
    """Of the experts, in the fastest tier."""

    @classmethod
    def of(cls, token_seconds: float, bytes_per_second: float, resident_share: float) -> MissCost:
        """Where a token takes so long and what it misses comes over a link of such speed."""
        return cls(1 / (bytes_per_second * token_seconds * TIME_FOR_HARM), resident_share)

    @classmethod
    def of_plan(cls, plan: Plan) -> MissCost | None:
        """As planned; None where nothing is missed."""
        if plan.mode in (None, "resident") or plan.tokens_per_s is None:
            return None
        return cls.of(1 / plan.tokens_per_s, plan.missed_bytes_per_s, plan.resident_fraction)

    def costs(self, sensitivity: Sensitivity, layer: int) -> list[float]:
        """Of each of a layer's experts, for every byte that it takes."""
        uses = [sensitivity.layers[layer].use(e) for e in range(len(sensitivity.layers[layer].uses))]
        per_byte = self.per_byte / sensitivity.nats
        found = zip(uses, hits(uses, self.resident_share), strict=True)
        return [per_byte * use * (1 - hit) for use, hit in found]


def hits(uses: Sequence[float], share: float) -> tuple[float, ...]:
    """How often each expert is resident when it is needed, if a cache holds `share` of a layer's experts.

    On average as often as is known of real models (`estimate.hit_rate`); over the experts it spreads as in
    Che's approximation of an LRU cache: one that is used at rate u is there with 1 - exp(-u T), where T is
    how long an expert stays unused (Che, Tung, Wang 2002).
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
