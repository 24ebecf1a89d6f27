"""Finds the smallest change of settings that makes a model fit that does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from moe_local.cache.keys import parse_bytes
from moe_local.offload.plan.placement import place
from moe_local.offload.plan.plan import Request

CONTEXT_STEP = 256
UNBOUNDED = 2**62


def nearest(request: Request) -> str | None:
    """The flags of the smallest change that makes a request fit; None if there is none.

    Tried in this order: fewer slots than asked for; a context of at least half; quantized experts; a
    quantized dense part; a short context; quantized experts and dense part, then also with a short context;
    larger budgets.
    """
    for flags, changed in _milder(request):
        if place(changed).fits:
            return flags
    return _enough_memory(request)


def _milder(request: Request) -> Iterator[tuple[str, Request]]:
    """(flags, the request with them) to try in turn."""
    spec = request.spec
    if request.slots is not None:
        top = min(request.slots, spec.num_experts)
        slots = _largest(spec.top_k, top, 1, lambda n: place(replace(request, slots=n)).fits)
        yield f"--slots {slots}", replace(request, slots=slots)
    half = _shorter(request, request.context // 2)
    yield f"--context {half.context}", half
    changes = [("--experts nf4", {"experts": "nf4"})] if request.experts != "nf4" else []
    if request.dense != "nf4":
        changes.append(("--dense nf4", {"dense": "nf4"}))
    for flags, change in changes:
        yield flags, replace(request, **change)  # type: ignore[arg-type]
    short = _shorter(request, CONTEXT_STEP)
    yield f"--context {short.context}", short
    quantized = replace(request, experts="nf4", dense="nf4")
    flags = " ".join(flags for flags, _ in changes)
    if flags:
        yield flags, quantized
        short = _shorter(quantized, CONTEXT_STEP)
        yield f"{flags} --context {short.context}", short


def _shorter(request: Request, least: int) -> Request:
    """The request with the longest context, in steps from `least`, that fits; with `least` if none does."""
    least = max(1, min(least, request.context))
    return replace(
        request,
        context=_largest(
            least, request.context, CONTEXT_STEP, lambda tokens: place(replace(request, context=tokens)).fits
        ),
    )


def _largest(low: int, high: int, step: int, fits: Callable[[int], bool]) -> int:
    """The largest low + k * step <= high that fits, `low` if none does; `fits` must be monotonic."""
    count = (high - low) // step
    first, last = 0, max(0, count)
    while first < last:
        middle = (first + last + 1) // 2
        if fits(low + middle * step):
            first = middle
        else:
            last = middle - 1
    return low + first * step


def _enough_memory(request: Request) -> str | None:
    """Flags of the smallest budgets that hold the request, without those that are large enough; else None."""
    flags = []
    if request.vram is not None:
        roomy = replace(request, ram=UNBOUNDED)
        if not place(roomy).fits:
            vram = _least_size(lambda size: place(roomy.with_vram(size)).fits)
            if vram is None:
                return None
            times = f"{len(request.cards)}x" if request.cards else ""
            flags.append(f"--vram {times}{vram}")
            request = request.with_vram(parse_bytes(vram))
    ram = _least_size(lambda size: place(replace(request, ram=size)).fits)
    if ram is None:
        return None
    if parse_bytes(ram) > request.ram:
        flags.append(f"--ram {ram}")
    return " ".join(flags)


def _least_size(fits: Callable[[int], bool]) -> str | None:
    """The smallest size that fits, written in tenths of a GiB or, below 1 GiB, in MiB; None if not even
    UNBOUNDED fits, for example with an absurd number of sequences."""
    for unit, step in (("MiB", 1.0), ("GiB", 0.1)):
        last = 1024 if unit == "MiB" else math.ceil(UNBOUNDED / 2**30 / step)
        if not fits(parse_bytes(_size(last, step, unit))):
            continue
        low, high = 0, last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(parse_bytes(_size(middle, step, unit))) else (middle, high)
        return _size(high, step, unit)
    return None


def _size(count: int, step: float, unit: str) -> str:
    return f"{count * step:.10g}{unit}"
