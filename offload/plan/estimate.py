"""Estimates the tokens per second of one sequence from the bytes that each token moves.

Every token reads the dense weights, the KV cache and K experts a layer from the fastest tier; experts that
are absent there first come over a slower link. The times are added, since a missed expert is needed at once;
good prefetching can at most overlap the two. The result rests on bandwidths and on hit rates that were seen
on a few models; it says what to expect at best, and ranks placements.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.plan.bandwidth import Bandwidths

READ_EFFICIENCY = 0.85
"""Share of a memory's bandwidth that matrix-vector kernels reach."""

TYPICAL_CONTEXT = 2048
"""Tokens of context whose keys and values a typical token reads."""

LAYER_SECONDS = 0.3e-3
"""Host time to launch one decoder layer's ~60 operations from Python; half of what a slow core needs."""

# Steady hit rates of an LRU cache for each layer by the share of experts it holds (first column).
# Many experts: Qwen3-30B-A3B, 128 experts, run at 6 a token, not its 8, replayed from a recorded decode
# of 128 tokens (github.com/Helldez/BigMoeOnEdge, docs/bench-data/2026-07-15-route-trace); an engine's own
# counters at 8 a token agree within 2 points.
MANY_EXPERTS = (
    (0.0, 0.0),
    (0.047, 0.27),
    (0.0625, 0.371),
    (0.125, 0.581),
    (0.188, 0.711),
    (0.25, 0.809),
    (0.375, 0.922),
    (0.5, 0.96),
    (1.0, 1.0),
)
# Few experts: Mixtral 8x7B, 8 experts, top-2. Consecutive tokens share an expert little more often than by
# chance (arXiv 2401.04088, table 5), and offloading with 2 to 4 slots hit 0.4 to 0.6 (arXiv 2312.17238).
FEW_EXPERTS = ((0.0, 0.0), (0.25, 0.32), (0.5, 0.6), (0.75, 0.82), (1.0, 1.0))
FEW = 32
"""Models with fewer experts a layer than this count as having few."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one decoded token reads, and which parts of the experts are where."""

    dense: int
    """Dense weights, and keys and values."""
    experts: int
    """The K active experts of all layers."""
    fastest_share: float
    """Share of all experts that the fastest tier holds."""
    ram_share: float
    """Share of all experts that RAM holds; 0 where RAM is the fastest tier."""


def hit_rate(share: float, num_experts: int) -> float:
    """The assumed probability that a needed expert is among the `share` of a layer that a cache holds."""
    table = FEW_EXPERTS if num_experts < FEW else MANY_EXPERTS
    if share >= 1:
        return 1.0
    right = bisect_right([point for point, _ in table], share)
    (x0, y0), (x1, y1) = table[right - 1], table[right]
    return y0 + (y1 - y0) * (share - x0) / (x1 - x0)


def tokens_per_second(
    traffic: Traffic, spec: ModelSpec, bandwidths: Bandwidths, *, cuda: bool, dispatch: bool = True
) -> float:
    """Tokens a second of one sequence.

    `dispatch=False` leaves out the host's time, so that only bytes count; that is the roofline if the fastest
    tier holds every expert.
    """
    fastest = bandwidths.vram if cuda else bandwidths.ram
    seconds = (traffic.dense + traffic.experts) / (READ_EFFICIENCY * fastest)
    if dispatch:
        seconds += LAYER_SECONDS * spec.num_layers
    missed = traffic.experts * (1 - hit_rate(traffic.fastest_share, spec.num_experts))
    return 1 / (seconds + missed / missed_bytes_per_second(traffic, spec, bandwidths, cuda=cuda))


def missed_bytes_per_second(
    traffic: Traffic, spec: ModelSpec, bandwidths: Bandwidths, *, cuda: bool
) -> float:
    """Bytes per second at which missed experts arrive: over the link and, if RAM lacks them, from disk."""
    if not cuda:
        return bandwidths.disk
    missed = 1 - hit_rate(traffic.fastest_share, spec.num_experts)
    below = min(missed, 1 - hit_rate(traffic.ram_share, spec.num_experts))
    return 1 / (1 / bandwidths.h2d + (below / missed / bandwidths.disk if missed else 0.0))


def read_per_token(spec: ModelSpec, dense: int, kv: int, context: int, width: int) -> int:
    """Bytes outside the routed experts that one token reads, of `dense` bytes of weights and `kv` of cache.

    Of an input embedding with its own table (`width` bytes a number) only one row is read; a tied table is
    read whole, as the output head.
    """
    tables = [tensor.numel for tensor in spec.dense if tensor.shape == (spec.vocab_size, spec.hidden_size)]
    looked_up = tables[0] * width if len(tables) > 1 else 0
    return dense - looked_up + int(kv * min(1.0, TYPICAL_CONTEXT / context))


def links(traffic: Traffic, *, cuda: bool) -> frozenset[str]:
    """Which of the four bandwidths the estimate rests on."""
    used = {"vram" if cuda else "ram"}
    if traffic.fastest_share < 1:
        used.add("h2d" if cuda else "disk")
        if cuda and traffic.ram_share < 1:
            used.add("disk")
    return frozenset(used)
