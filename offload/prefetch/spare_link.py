"""Whether a copy for a later layer is worth the link's time, and how often guesses have been right."""

from __future__ import annotations

from collections.abc import Callable

FADE = 1 - 1 / 128
"""Factor by which each guess fades the weight of earlier ones."""
PRIOR = 8.0
"""How many guesses the first expectation counts as."""
EXPECTED = 0.6
"""How often a guess of an absent expert is right before any was seen."""


class Accuracy:
    """How often an absent expert that was guessed was needed, by distance and rank in the guess.

    Of the absent ones alone: those that a cache holds are the easy ones, and their share says nothing.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[float, float]] = {}

    def saw(self, distance: int, rank: int, right: bool) -> None:
        """A guess turned out right or wrong."""
        good, count = self._seen.get((distance, rank), (EXPECTED * PRIOR, PRIOR))
        self._seen[distance, rank] = (good * FADE + right, count * FADE + 1)

    def of(self, distance: int, rank: int) -> float:
        """From 0 to 1. A distance not seen yet is expected to be as good as the nearest one that was."""
        seen = self._seen.get((distance, rank))
        if seen is None:
            near = [d for d, r in self._seen if r == rank and d < distance]
            return self.of(max(near), rank) if near else EXPECTED
        return seen[0] / seen[1]


class SpareLink:
    """Weighs a copy that may be of use later against the demand that it may stand in the way of.

    Nothing overtakes a copy that a device was given. If the guess is right, the wait that it saves is at
    most the copy, and no more than has passed when its layer comes. If it is wrong, the next layer's
    misses wait for what is left of it. Reads from disk come in pieces that demand overtakes, so that a
    wrong one costs next to nothing: without `copy_seconds` everything is worth while.
    """

    def __init__(self, copy_seconds: Callable[[int], float] | None) -> None:
        """`copy_seconds(nbytes)` of one copy that runs to its end; None where demand overtakes."""
        self.copy_seconds = copy_seconds
        self.layer_s = 0.0
        """From one MoE layer to the next, waits for experts left out. 0 until it is known."""
        self.demand = 1.0
        """How likely it is that the next layer misses something."""

    def worth(self, nbytes: int, queued_bytes: int, distance: int, accuracy: float) -> bool:
        """Whether to issue a copy for a layer `distance` ahead behind `queued_bytes` of other guesses."""
        if self.copy_seconds is None:
            return True
        if not self.layer_s:
            return False
        own = self.copy_seconds(nbytes)
        queue = self.copy_seconds(queued_bytes) if queued_bytes else 0.0
        saved = own - max(0.0, queue + own - distance * self.layer_s)
        delay = max(0.0, queue + own - self.layer_s) - max(0.0, queue - self.layer_s)
        return accuracy * saved > (1 - accuracy) * self.demand * delay
