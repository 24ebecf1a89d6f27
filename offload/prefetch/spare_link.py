"""Decides whether a prefetch is worth its time on the link, given how often guesses have been right."""

from __future__ import annotations

from collections.abc import Callable

FADE = 1 - 1 / 128
"""Decay of the weight of earlier guesses with each new one."""
PRIOR = 8.0
"""Number of guesses that EXPECTED counts as at the start."""
EXPECTED = 0.6
"""Assumed accuracy of a guess of an absent expert before any was seen."""


class Accuracy:
    """How often guessed experts that were absent turned out to be needed, by distance and rank in the guess.

    Only absent experts count: those that the cache holds are easy to guess, and say nothing about the others.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[float, float]] = {}

    def saw(self, distance: int, rank: int, right: bool) -> None:
        """Record whether a guess turned out to be right."""
        good, count = self._seen.get((distance, rank), (EXPECTED * PRIOR, PRIOR))
        self._seen[distance, rank] = (good * FADE + right, count * FADE + 1)

    def of(self, distance: int, rank: int) -> float:
        """The accuracy, from 0 to 1. A distance not seen yet is assumed to be as accurate as the nearest
        shorter one that was."""
        seen = self._seen.get((distance, rank))
        if seen is None:
            near = [d for d, r in self._seen if r == rank and d < distance]
            return self.of(max(near), rank) if near else EXPECTED
        return seen[0] / seen[1]


class SpareLink:
    """Weighs a prefetch, which may be useful later, against the demand loads that it may delay.

    A copy that was issued to a device cannot be overtaken. If the guess is right, it saves at most the copy's
    time, and only the part that has passed by the time its layer runs. If it is wrong, the next layer's
    misses wait for the rest of the copy. Reads from disk are split into pieces, which demand loads overtake,
    so that a wrong guess costs next to nothing: without `copy_seconds` every prefetch is worth its time.
    """

    def __init__(self, copy_seconds: Callable[[int], float] | None) -> None:
        """`copy_seconds(nbytes)`: time of one uninterruptible copy; None where demand loads overtake it."""
        self.copy_seconds = copy_seconds
        self.layer_s = 0.0
        """Seconds from one MoE layer to the next, without waits for experts. 0 until it is known."""
        self.demand = 1.0
        """Probability that the next layer misses an expert."""

    def worth(self, nbytes: int, queued_bytes: int, distance: int, accuracy: float) -> bool:
        """Whether to issue a copy for a layer `distance` ahead, behind `queued_bytes` of other guesses."""
        if self.copy_seconds is None:
            return True
        if not self.layer_s:
            return False
        own = self.copy_seconds(nbytes)
        queue = self.copy_seconds(queued_bytes) if queued_bytes else 0.0
        saved = own - max(0.0, queue + own - distance * self.layer_s)
        delay = max(0.0, queue + own - self.layer_s) - max(0.0, queue - self.layer_s)
        return accuracy * saved > (1 - accuracy) * self.demand * delay
