"""Computes the reported figures from samples."""

from __future__ import annotations

import functools
import math
import operator
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from moe_local.cache.stats import Stats
from moe_local.offload.measure.ratio import median_interval
from moe_local.offload.measure.sample import Sample, Step


def percentile(values: Sequence[float], share: float) -> float:
    """The quantile `share` of `values`, linearly interpolated between two values (numpy's default)."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (place - below)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes, and the interval that holds the true median with 95 % confidence, or None."""
    interval = median_interval(values)
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "interval_95": None if interval is None else list(interval),
        "repeats": len(values),
    }


def total(steps: Iterable[Step]) -> Stats:
    """The counts of all steps together."""
    counts = [step.counts for step in steps]
    return functools.reduce(operator.add, counts) if counts else Stats()


def stall_ms(counts: Stats, tokens: int) -> dict[str, float]:
    """Milliseconds of stall per token, by cause."""
    return {cause: 1000 * s / max(1, tokens) for cause, s in asdict(counts.stall).items()}


def times(samples: Sequence[Sample]) -> dict[str, Any]:
    """Latency and throughput over the timed samples of one workload, and how a token's time was spent.

    A decode step's time is the sum of its stalls, by cause, and the rest, in which something was computed or
    dispatched.
    """
    tpot = [ms for sample in samples for ms in sample.tpot_ms]
    steps = [step for sample in samples for step in sample.decode]
    tokens, ms = sum(step.tokens for step in steps), sum(step.ms for step in steps)
    counts = total(steps)
    stalls = stall_ms(counts, tokens)
    ttft = [statistics.median(sample.ttft_s) for sample in samples]
    needed = counts.prefetch.used + counts.misses
    return {
        "ttft_s": statistics.median(ttft),
        "ttft_s_spread": spread(ttft),
        "tpot_ms": {
            "mean": statistics.fmean(tpot),
            "p50": percentile(tpot, 0.50),
            "p95": percentile(tpot, 0.95),
            "p99": percentile(tpot, 0.99),
            "spread": spread([statistics.fmean(sample.tpot_ms) for sample in samples]),
        },
        "tokens_per_s": {
            "prefill": statistics.median(s.prompt_tokens / s.prefill_s for s in samples),
            "decode": 1000 * tokens / ms,
            "decode_spread": spread([s.decode_tokens / s.decode_s for s in samples]),
        },
        "stall_ms_per_token": stalls,
        "other_ms_per_token": ms / tokens - sum(stalls.values()),
        "hits_per_token": counts.hits / tokens,
        "misses_per_token": counts.misses / tokens,
        "hit_rate_timed": counts.hit_rate,
        "prefetch": {
            **asdict(counts.prefetch),
            "misses_covered": counts.prefetch.used / needed if needed else None,
        },
        "bytes_per_token": {"h2d": counts.bytes.h2d / tokens, "disk": counts.bytes.disk / tokens},
        "prompt_tokens": statistics.median(sample.prompt_tokens for sample in samples),
        "decoded_tokens": tokens,
    }


def hit_rates(sample: Sample) -> dict[str, Any]:
    """Hit rates of a sample that decoded from an empty cache: "cold" of all, "steady" of its second half."""
    counts = total(sample.decode)
    return {
        "cold": counts.hit_rate,
        "steady": total(sample.decode[len(sample.decode) // 2 :]).hit_rate,
        "by_layer": list(counts.hit_rate_by_layer),
        "decode_steps": len(sample.decode),
    }


def timeline(sample: Sample) -> list[dict[str, Any]]:
    """Each decode step of a sample: milliseconds, milliseconds of stall by cause, hits and misses."""
    return [
        {
            "ms": step.ms,
            "stall_ms": {cause: 1000 * s for cause, s in asdict(step.counts.stall).items() if s},
            "hits": step.counts.hits,
            "misses": step.counts.misses,
        }
        for step in sample.decode
    ]
