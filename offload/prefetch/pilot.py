"""Chooses how many layers ahead to prefetch (0 is off) by trying out what makes tokens fastest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moe_local.offload.prefetch.comparison import Comparison, Gain

WARM_UP = 8
"""Tokens before the first trial, since an empty cache is not representative of later tokens."""
TRIAL_SHARE = 0.01
"""Share of the time that may be lost in trials, the first one not counted."""
SHORTEST_REST, LONGEST_REST = 64, 4096
"""Tokens between two trials."""
LEAST_LOSS = 0.02
"""A trial is assumed to have cost at least this share of a token's time for each of its tokens."""
PATIENCE = 8
"""Largest factor by which trials that changed nothing prolong the rest before the next one."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The pilot's choice and its measurements. Gains are seconds per token compared with no lookahead."""

    state: str
    """"on" or "off"; "trying" before the first verdict."""
    lookahead: int
    gain: Gain | None
    """The gain with `lookahead` layers or, when off, of the last trial; None before the first verdict."""


class Pilot:
    """Chooses `lookahead` for each token from the seconds that earlier tokens took; 0 is off.

    It begins with off and compares (`Comparison`) the current lookahead with another one: off with one layer
    ahead or, if that was of no use, two; d layers ahead with d + 1, with d - 1 and with off. Between trials
    it rests so long that the time they lose stays below TRIAL_SHARE, and longer the more trials in a row
    changed nothing.
    """

    def __init__(self, most: int, promising: Callable[[], bool] = lambda: True) -> None:
        """`most`: the largest lookahead, at least 1. While off, nothing is tried unless `promising()`."""
        self.lookahead = 0
        """The lookahead for the next token."""
        self._most = most
        self._promising = promising
        self._settled = 0
        self._challenger = 0
        self._comparison: Comparison | None = None
        self._rest = WARM_UP
        self._patience = 1
        self._turn = 0
        self._gain: Gain | None = None
        self._judged = False

    @property
    def outlook(self) -> Outlook:
        state = "on" if self._settled else "off"
        if self._comparison is not None and not self._judged:
            state = "trying"
        return Outlook(state, self._settled, self._gain)

    def step(self, seconds: float | None) -> bool:
        """Record that a token with `lookahead` took `seconds` (None: unknown). Returns whether the outlook
        has changed."""
        if self._comparison is None:
            self._rest -= 1
            if self._rest > 0:
                return False
            return self._begin()
        won = self._comparison.saw(seconds)
        if won is not None:
            self._conclude(self._comparison, won)
        else:
            self.lookahead = self._challenger if self._comparison.challenging else self._settled
        return won is not None

    def _begin(self) -> bool:
        if not self._settled and not self._promising():
            self._judged = True
            self._rest = SHORTEST_REST
            return True
        self._challenger = self._next()
        self._comparison = Comparison(modest=self._challenger < self._settled)
        return True

    def _next(self) -> int:
        """The lookahead to try next: the sensible alternatives to the current one, in turn."""
        here = self._settled
        wanted = (0, here + 1, here - 1) if here else (1, 2)
        options = list(dict.fromkeys(d for d in wanted if 0 <= d <= self._most))
        chosen = options[self._turn % len(options)]
        self._turn += 1
        return chosen

    def _conclude(self, comparison: Comparison, won: bool) -> None:
        gain = comparison.gain()
        if gain is not None:
            self._note(gain)
        incumbent_s, challenger_s = comparison.token_s
        climbed = won and self._challenger > self._settled
        if won:
            self._settled, self._patience = self._challenger, 1
        else:
            self._patience = min(2 * self._patience, PATIENCE)
        loss = max(LEAST_LOSS, challenger_s / incumbent_s - 1 if incumbent_s else 0.0)
        rest = math.ceil(loss * comparison.tokens[1] / TRIAL_SHARE) * self._patience
        self._rest = 1 if climbed else min(max(rest, SHORTEST_REST), LONGEST_REST)
        if won:
            self._turn = int(climbed)  # after a step up try another step up, else begin with the first option
        self._comparison, self._judged = None, True
        self.lookahead = self._settled

    def _note(self, gain: Gain) -> None:
        """Update the gain over off, where the comparison gives it."""
        if self._settled == 0:
            self._gain = gain
        elif self._challenger == 0:
            self._gain = gain.reversed()
        elif self._challenger > self._settled and gain.low is not None and gain.low > 0:
            before = self._gain or Gain(0.0, 0.0, 0.0)
            self._gain = before.plus(gain)
