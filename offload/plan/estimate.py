"""How many tokens a second the bytes allow: physics of one sequence decoded token by token.

Every token reads the dense weights, the KV cache and K experts a layer from the fastest tier; experts that
are not there come over a slower link first. Times add up, since what a miss brings is needed at once; good
prefetching can at most hide one behind the other. The result is an estimate from bandwidths and from hit
rates seen on a few models; it says what to expect at best, and ranks placements.
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
    """Weights and keys and values outside the routed experts."""
    experts: int
    """The K active experts of all layers."""
    fastest_share: float
    """Share of all experts that the fastest tier holds."""
    ram_share: float
    """Share of all experts that RAM holds; 0 where RAM is the fastest tier."""


def hit_rate(share: float, num_experts: int) -> float:
    """The prior: how often a needed expert is among the `share` of a layer's experts that a cache holds."""
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

    `dispatch=False` leaves the host's time out: what the bytes alone would allow, which is the roofline where
    the fastest tier has every expert.
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
    """How fast what the fastest tier misses comes: over the link and, as far as RAM misses it, from disk."""
    if not cuda:
        return bandwidths.disk
    missed = 1 - hit_rate(traffic.fastest_share, spec.num_experts)
    below = min(missed, 1 - hit_rate(traffic.ram_share, spec.num_experts))
    return 1 / (1 / bandwidths.h2d + (below / missed / bandwidths.disk if missed else 0.0))


def read_per_token(spec: ModelSpec, dense: int, kv: int, context: int, width: int) -> int:
    """Bytes outside the routed experts that one token reads, of `dense` bytes of weights and `kv` of cache.

    An input embedding with a table of its own (`width` bytes a number) gives one row only; a tied one is
    read whole as output head.
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
