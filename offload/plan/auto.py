"""experts="auto": the most bits per weight with which all experts still fit the budget.

If the experts do not all fit even with the fewest bits, every bit also costs time, since absent experts come
over a slow link. Then bits are weighed against time, by the known errors of formats and known hit rates.
More bits than int8's are never chosen, since the error of int8 is not noticeable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from moe_local.offload.allocation.expected import NATS_PER_ERROR, candidates, format_error
from moe_local.offload.allocation.misses import TIME_FOR_HARM
from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.plan.plan import Plan
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.mix import bits_asked, is_mixed, name_of, uniform_bytes

STEPS = 100
"""Steps per bit in which bits are chosen."""
NEAR = 0.25
"""Bits per weight by which a mix that is already converted may differ from the best one and still be used."""
FAST_ENOUGH = 0.8
"""Share of the best mix's tokens per second that a converted mix with more bits, whose experts do not all
fit, must reach to be used. Free memory changes from day to day, and conversions take time and disk space."""


def choose(plan_of: Callable[[str], Plan], spec: ModelSpec, have: Iterable[str] = ()) -> str:
    """The format that "auto" chooses: "mixed:BITS", or a single format where that is the same.

    `plan_of` plans the model with experts of a format; `have`: mixes that are already converted.
    Deterministic.
    """
    sizes = format_bits(spec)
    low, high = math.ceil(min(sizes.values()) * STEPS), math.floor(max(sizes.values()) * STEPS)
    largest = max(sizes, key=sizes.__getitem__)
    if plan_of(largest).mode == "resident":
        return largest
    if low <= high and plan_of(_name(low)).mode == "resident":
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if plan_of(_name(middle)).mode == "resident" else (low, middle - 1)
    else:
        low = min(range(low, high + 1, STEPS // 10), key=lambda step: _cost(plan_of, spec, step), default=low)
    return _name(low) if (near := _near(plan_of, low / STEPS, have)) is None else near


def _near(plan_of: Callable[[str], Plan], best: float, have: Iterable[str]) -> str | None:
    """The converted mix to use in place of the best one: the one with most bits of those with fewer than the
    best, else the one with fewest of those with more, if it is fast enough."""
    made = {bits_asked(name): name for name in have if is_mixed(name) and name != "auto"}
    if fewer := [bits for bits in made if best - NEAR <= bits <= best]:
        return made[max(fewer)]
    target = plan_of(name_of(best)).tokens_per_s
    if more := [bits for bits in made if best < bits <= best + NEAR]:
        name = made[min(more)]
        speed = plan_of(name).tokens_per_s
        if speed is not None and target is not None and speed >= FAST_ENOUGH * target:
            return name
    return None


def go_on(plan_of: Callable[[str], Plan], begun: Iterable[str]) -> str | None:
    """The first of the unfinished conversions, begun by "auto" with the same budget, that fits; else None.

    The free memory differs a little at every start; that is no reason to discard a conversion that may have
    taken hours.
    """
    return next((experts for experts in begun if plan_of(experts).fits), None)


def _name(step: int) -> str:
    return name_of(step / STEPS)


def _cost(plan_of: Callable[[str], Plan], spec: ModelSpec, step: int) -> float:
    """The cost of this many bits: the logarithm of a token's time plus the weighted error."""
    speed = plan_of(_name(step)).tokens_per_s
    harm = expected_nats(spec, step / STEPS)
    return math.inf if speed is None else TIME_FOR_HARM * harm - math.log(speed)


def format_bits(spec: ModelSpec) -> dict[str, float]:
    """Bits per weight, in this model, of the quantized formats that may be chosen."""
    return {
        name: 8 * uniform_bytes(spec, name) / spec.expert_numel
        for name in candidates(spec.dtype)
        if not codec_for(name).exact
    }


def expected_nats(spec: ModelSpec, bits: float) -> float:
    """The expected increase of log perplexity from experts of so many bits on average, extrapolated from one
    model (NATS_PER_ERROR), with bits spread evenly over experts; a mix chosen by sensitivity costs less."""
    points = sorted((size, format_error(name)) for name, size in format_bits(spec).items())
    return NATS_PER_ERROR * _between(points, bits)


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear interpolation between points, constant beyond them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
