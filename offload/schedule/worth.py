"""Measures how many hits are gained by giving an expert a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HORIZON = 16
"""Number of later steps of its layer over which an admission's worth is counted."""
MOST_WATCHED = 8
"""Most admissions of one layer that are observed at a time."""
WEIGHT = 0.005
"""Weight of one admission in the average; the first ones weigh more. It is small because admissions differ
much, and routing changes slowly."""
FIRST_GUESS = 0.5


@dataclass(slots=True)
class _Admission:
    expert: int
    victim: int
    steps: int = 0
    net: int = 0


class AdmissionWorth:
    """How much more often an admitted expert is needed than the victim evicted for it, on average.

    Both needs are counted over the next HORIZON steps of their layer, so this holds for any policy and any
    routing: the average is 0 where past needs say nothing about later ones, and well above 1 where the same
    experts are needed token after token.
    """

    def __init__(self) -> None:
        self.hits = FIRST_GUESS
        """The average; may be below 0."""
        self._known = 10
        """Number of admissions in the average; FIRST_GUESS counts as the initial number."""
        self._watched: dict[int, list[_Admission]] = {}

    def admitted(self, layer: int, expert: int, victim: int) -> None:
        """An expert was given the victim's slot."""
        watched = self._watched.setdefault(layer, [])
        if len(watched) < MOST_WATCHED:
            watched.append(_Admission(expert, victim))

    def needed(self, layer: int, experts: Sequence[int]) -> None:
        """A step needs these experts of a layer."""
        watched = self._watched.get(layer)
        if not watched:
            return
        for admission in watched:
            admission.steps += 1
            admission.net += (admission.expert in experts) - (admission.victim in experts)
        while watched and watched[0].steps == HORIZON:  # they are in the order of their admission
            self._known += 1
            self.hits += max(WEIGHT, 1 / self._known) * (watched.pop(0).net - self.hits)
