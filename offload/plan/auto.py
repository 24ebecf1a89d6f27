"""experts="auto": as many bits a weight as the budget holds all experts with.

Where not even the fewest bits hold all of them, every bit costs time as well, since what is absent is brought
over a slow link: then bits are weighed against time, by what is known of formats' errors and of hit rates.
Bits beyond int8 are never chosen, since its error cannot be seen.
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
"""A bit is given out in so many parts."""
NEAR = 0.25
"""Bits a weight by which a mix that is there already may miss the best, and is taken."""
FAST_ENOUGH = 0.8
"""Of the best one's tokens a second: what a mix with more bits, not all of whose experts fit, must reach
to be taken. Free memory changes from day to day, and each conversion takes long and as much disk again."""


def choose(plan_of: Callable[[str], Plan], spec: ModelSpec, have: Iterable[str] = ()) -> str:
    """What "auto" comes to: "mixed:BITS", or one format where that is the same.

    `plan_of` plans the model with such experts; `have` are mixes that are converted already. Deterministic.
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
    """The converted mix to take in place of the best one: of those with fewer bits the one with most, else of
    those with more the one with fewest, if it is fast enough."""
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
    """The first of the conversions that "auto" has begun before, with the same budget, that fits; else None.

    Memory that is free changes from start to start: what is more or less of it by now does not count against
    the hours that may be in what was begun.
    """
    return next((experts for experts in begun if plan_of(experts).fits), None)


def _name(step: int) -> str:
    return name_of(step / STEPS)


def _cost(plan_of: Callable[[str], Plan], spec: ModelSpec, step: int) -> float:
    """Of so many bits: the logarithm of a token's time, and what their error is worth in it."""
    speed = plan_of(_name(step)).tokens_per_s
    harm = expected_nats(spec, step / STEPS)
    return math.inf if speed is None else TIME_FOR_HARM * harm - math.log(speed)


def format_bits(spec: ModelSpec) -> dict[str, float]:
    """Bits a weight of the quantizing formats that are chosen from, of this model."""
    return {
        name: 8 * uniform_bytes(spec, name) / spec.expert_numel
        for name in candidates(spec.dtype)
        if not codec_for(name).exact
    }


def expected_nats(spec: ModelSpec, bits: float) -> float:
    """What experts of so many bits on average add to the logarithm of perplexity, by what is known of one
    model (NATS_PER_ERROR), dealt out evenly: chosen ones cost less."""
    points = sorted((size, format_error(name)) for name, size in format_bits(spec).items())
    return NATS_PER_ERROR * _between(points, bits)


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between points, level beyond them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
