"""What it has been worth to give an expert a slot, in hits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HORIZON = 16
"""So many later steps of its layer decide what an admission was worth."""
MOST_WATCHED = 8
"""Admissions of one layer that are watched at a time."""
WEIGHT = 0.005
"""Of one admission in the average, of the first ones more: they differ much, and routing changes slowly."""
FIRST_GUESS = 0.5


@dataclass(slots=True)
class _Admission:
    expert: int
    victim: int
    steps: int = 0
    net: int = 0


class AdmissionWorth:
    """How much more often an admitted expert is needed than the one that had to leave for it, on average.

    Both are counted over the next HORIZON steps of their layer, so this holds for any policy and any
    routing: where what was needed says nothing about what will be it is 0, where the same experts are
    needed token after token it is well above 1.
    """

    def __init__(self) -> None:
        self.hits = FIRST_GUESS
        """The average; may be below 0."""
        self._known = 10
        """Admissions in the average; the guess counts as so many."""
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
