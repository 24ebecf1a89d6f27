"""Chooses the sizes of a layer's slots where its experts have several sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import ceil

SMOOTHING = 0.1
"""Added to every expert's number of uses, as a share of the average expert's."""


@lru_cache(maxsize=4096)
def slot_ladder(sizes: tuple[int, ...], top_k: int, use: tuple[float, ...] | None = None) -> tuple[int, ...]:
    """Bytes of each slot of a layer whose experts have these `sizes`: a cache of n slots has the first n.

    All slots together are one for each expert, of its own size. The first `top_k` are chosen from the largest
    size downwards: of each size or larger there are as many slots as a token needs on average and one more,
    so that few tokens need more at once (those are served in waves). The other slots are distributed over the
    sizes in proportion to `use`, how often each expert is needed; None: all equally often. Where experts with
    more bits are also used more, slots in proportion to the number of experts would miss two to three times
    the bytes (docs/log.md).
    """
    have = Counter(sizes)
    if len(have) <= 1:
        return sizes
    classes = sorted(have, reverse=True)
    weight = _use_by_size(sizes, use)
    top_k = min(top_k, len(sizes))
    taken = _first(classes, have, weight, top_k)
    ladder = sorted(taken.elements(), reverse=True)
    while len(ladder) < len(sizes):
        left = [size for size in classes if taken[size] < have[size]]
        size = max(left, key=lambda size: weight[size] / (taken[size] + 0.5))
        taken[size] += 1
        ladder.append(size)
    return tuple(ladder)


def arena_bytes(slots: Sequence[int], ladders: Sequence[Sequence[int]]) -> int:
    """Bytes of an arena in which each MoE layer has `slots[layer]` slots, the first of its ladder."""
    return sum(sum(ladder[:count]) for count, ladder in zip(slots, ladders, strict=True))


def _use_by_size(sizes: Sequence[int], use: Sequence[float] | None) -> dict[int, float]:
    """For each size, the share of a token's experts that have it."""
    if use is None or not sum(use):
        use = [1.0] * len(sizes)
    more = SMOOTHING * sum(use) / len(use)
    total = sum(use) + more * len(use)
    shares = dict.fromkeys(sizes, 0.0)
    for size, count in zip(sizes, use, strict=True):
        shares[size] += (count + more) / total
    return shares


def _first(classes: Sequence[int], have: Counter[int], weight: dict[int, float], top_k: int) -> Counter[int]:
    """How many of the first `top_k` slots have each size; `classes` are the sizes, largest first."""
    taken: Counter[int] = Counter()
    share, reached, experts = 0.0, 0, 0
    for size in classes:
        share += weight[size]
        experts += have[size]
        target = min(top_k, experts, ceil(top_k * share) + 1)
        taken[size] = min(have[size], max(0, target - reached))
        reached += taken[size]
    for size in reversed(classes):
        more = min(have[size] - taken[size], top_k - reached)
        taken[size] += more
        reached += more
    return taken
