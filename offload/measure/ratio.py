"""How many times faster one thing is than another, from rounds in which both were measured in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the rounds' ratios, and the interval that holds the true median."""

    median: float
    low: float | None
    """None if there are too few rounds for an interval of `CONFIDENCE`."""
    high: float | None
    rounds: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """`ours[r]` / `theirs[r]`, both of round r. Raises ValueError for different numbers of rounds."""
        ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
        low, high = median_interval(ratios) or (None, None)
        return cls(statistics.median(ratios), low, high, len(ratios))

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "low": self.low, "high": self.high, "rounds": self.rounds}

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.median:.3f} (no interval from {self.rounds} rounds)"
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """A confidence interval for the median of the distribution of `values`; None if they are too few (6 are
    enough for 95 %).

    The interval from the k-th smallest to the k-th largest value misses the median only if fewer than k of n
    values fall on one side of it. The probability of that is the one of n coin tosses, and k is the largest
    for which it is small enough. Assumes nothing about the distribution, and one disturbed round cannot move
    the interval far.
    """
    count = len(values)
    ranked = sorted(values)
    tail, rank = 0.0, 0
    while rank <= count // 2:
        tail += math.comb(count, rank) / 2**count
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank += 1
    return (ranked[rank - 1], ranked[count - rank]) if rank else None
