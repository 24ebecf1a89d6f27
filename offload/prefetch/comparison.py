"""An A/B test, run while tokens are generated, of which of two ways makes them faster."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

BLOCK = 6
"""Consecutive tokens that are generated one way. The first of them is not measured, since the other way's
loads and evictions still affect it."""
FEWEST_PAIRS = 3
MOST_PAIRS = 12
CLIP = 2.0
"""A token's time is clipped to this many times the median: the process or the reader may have paused."""
HOPELESS = ((1, 1.5), (2, 1.2))
"""(pairs, factor): after so many pairs of blocks the challenger has lost if its fastest block took more than
`factor` times as long as the incumbent's slowest."""
NOT_WORTH = 0.005
"""A gain below this share of a token's time counts as none."""

_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20)
"""Student's t for 95 % two-sided, by degrees of freedom from 1."""


class Gain(NamedTuple):
    """Seconds per token that the challenger saves, with the 95 % confidence interval."""

    seconds: float
    low: float | None
    """None, like `high`, where there is only a single pair."""
    high: float | None

    def reversed(self) -> Gain:
        """The incumbent's gain over the challenger."""
        return Gain(-self.seconds, _minus(self.high), _minus(self.low))

    def plus(self, other: Gain) -> Gain:
        """The sum of two gains; the bounds of the intervals are added as well."""
        return Gain(self.seconds + other.seconds, _sum(self.low, other.low), _sum(self.high, other.high))


class Comparison:
    """Blocks of tokens generated in turn by the incumbent's way and the challenger's, until one is better.

    Blocks come in pairs whose order alternates, and the two blocks of a pair are compared, so that drift (a
    growing context, a busy machine) affects both alike. The challenger wins if the whole confidence interval
    of its gain is above 0. Without a clear winner the incumbent stays, unless `modest` is set: it says that
    the challenger does less work, which therefore wins where the incumbent is not better on average.
    """

    def __init__(self, *, modest: bool = False) -> None:
        self.modest = modest
        self.challenging = False
        """Whether the next token is to be generated the challenger's way."""
        self.tokens = [0, 0]
        """Tokens generated the incumbent's way, and the challenger's."""
        self._blocks: list[list[list[float]]] = [[], []]
        self._block: list[float] = []
        self._position = 0

    def saw(self, seconds: float | None) -> bool | None:
        """Record that the last token, generated the way `challenging` says, took `seconds` (None: unknown).

        Returns True once the challenger has won, False once it has lost, None while the comparison goes on;
        `challenging` may have changed then.
        """
        self.tokens[self.challenging] += 1
        self._position += 1
        if seconds is not None and self._position > 1:
            self._block.append(seconds)
        if self._position < BLOCK:
            return None
        self._position = 0
        if len(self._block) < BLOCK - 2:
            self._block = []  # too few of its tokens were measured: repeat this block
            return None
        self._blocks[self.challenging].append(self._block)
        self._block = []
        counts = [len(blocks) for blocks in self._blocks]
        if counts[0] == counts[1]:  # the next pair begins with the same way, so the order alternates
            return self._verdict(counts[0])
        self.challenging = not self.challenging
        return None

    def gain(self) -> Gain | None:
        """The challenger's gain, from complete pairs of blocks; None before the first pair."""
        incumbent, challenger = self._means()
        differences = [a - b for a, b in zip(incumbent, challenger, strict=False)]
        if not differences:
            return None
        mean = statistics.fmean(differences)
        if len(differences) < 2:
            return Gain(mean, None, None)
        t = _T95[min(len(differences) - 1, len(_T95)) - 1]
        reach = t * statistics.stdev(differences) / math.sqrt(len(differences))
        return Gain(mean, mean - reach, mean + reach)

    @property
    def token_s(self) -> tuple[float, float]:
        """Seconds per token of the incumbent and of the challenger; 0 for one without a complete block."""
        incumbent, challenger = self._means()
        return (
            statistics.fmean(incumbent) if incumbent else 0.0,
            statistics.fmean(challenger) if challenger else 0.0,
        )

    def _verdict(self, pairs: int) -> bool | None:
        incumbent, challenger = self._means()
        if any(pairs == n and min(challenger) > factor * max(incumbent) for n, factor in HOPELESS):
            return False
        gain = self.gain()
        if pairs < FEWEST_PAIRS or gain is None or gain.low is None or gain.high is None:
            return None
        worth = NOT_WORTH * statistics.fmean(incumbent)
        if gain.low > 0:
            return True if self.modest else gain.seconds > worth
        if gain.high < worth:
            return False
        if pairs >= MOST_PAIRS:
            return self.modest and gain.seconds >= 0
        return None

    def _means(self) -> tuple[Sequence[float], Sequence[float]]:
        """The mean seconds per token of each block, with long tokens clipped (CLIP)."""
        every = [s for blocks in self._blocks for block in blocks for s in block]
        most = CLIP * statistics.median(every) if every else 0.0
        first, second = (
            [statistics.fmean(min(s, most) for s in block) for block in blocks] for blocks in self._blocks
        )
        return first, second


def _minus(number: float | None) -> float | None:
    return None if number is None else -number


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
