"""The multiple-choice knapsack problem: one option for every item, with least total cost, within a size.

It is solved exactly, by dynamic programming, where it is small enough. Otherwise each item's options are
reduced to their lower convex hull, and steps along the hulls are taken in the order of the cost saved per
byte. This also solves the relaxed problem, in which an option may be taken in part, and so bounds how far the
answer is from the optimum. Where steps are small compared with the whole, that is next to nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

MOST_CELLS = 1 << 25
"""Most items x sizes x options that are solved exactly: it takes less than a second and 32 MiB of choices."""


class Option(NamedTuple):
    """One of the alternatives for an item."""

    nbytes: int
    cost: float
    """Any finite number: costs are only compared and added."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A solution: one option of each item."""

    picked: tuple[int, ...]
    """For each item the index of its option."""
    nbytes: int
    cost: float
    bound: float
    """No assignment within the size costs less than this; equal to `cost` if it was solved exactly."""

    @property
    def gap(self) -> float:
        """Largest share of the cost that a better assignment could save; 0: there is none better."""
        return 0.0 if self.cost <= self.bound else (self.cost - self.bound) / abs(self.cost)


def solve(items: Sequence[Sequence[Option]], room: int, *, exact: bool | None = None) -> Choice:
    """The cheapest assignment of at most `room` bytes. Deterministic: the same answer for the same arguments.

    `exact`: whether to solve exactly or by steps along the hulls; None: exactly where MOST_CELLS allow it.
    Raises ValueError if even the smallest options together are larger than `room`.
    """
    smallest = sum(min(option.nbytes for option in options) for options in items)
    if smallest > room:
        raise ValueError(f"the smallest options take {smallest} bytes, there are {room}")
    unit = _unit(items)
    spare = min(room - smallest, sum(max(o.nbytes for o in options) for options in items) - smallest)
    cells = (spare // unit + 1) * sum(map(len, items))
    if exact or (exact is None and cells <= MOST_CELLS):
        return _exact(items, unit, spare)
    return _along_hulls(items, spare)


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of cost over size, smallest first.

    The first is the smallest option (of equally small ones the cheapest, then the first), the last the
    cheapest one.
    """
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].cost, i))
    kept: list[int] = []
    for i in order:
        if kept and options[i].cost >= options[kept[-1]].cost:
            continue
        while len(kept) > 1 and _gain(options, kept[-2], kept[-1]) <= _gain(options, kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def _gain(options: Sequence[Option], smaller: int, larger: int) -> float:
    """The cost saved per byte by changing from one option to a larger, cheaper one."""
    return (options[smaller].cost - options[larger].cost) / (options[larger].nbytes - options[smaller].nbytes)


def _unit(items: Sequence[Sequence[Option]]) -> int:
    """The greatest common divisor of all differences in bytes between an item's options; at least 1."""
    unit = 0
    for options in items:
        for option in options:
            unit = math.gcd(unit, option.nbytes - options[0].nbytes)
    return max(1, unit)


def _exact(items: Sequence[Sequence[Option]], unit: int, spare: int) -> Choice:
    """Computes, item by item, the least cost for every number of units beyond the smallest options."""
    states = spare // unit + 1
    best = torch.zeros(states, dtype=torch.float64)
    chosen = torch.empty(len(items), states, dtype=torch.uint8)
    extras = []
    for number, options in enumerate(items):
        least = min(option.nbytes for option in options)
        extra = [(option.nbytes - least) // unit for option in options]
        extras.append(extra)
        new = torch.full_like(best, math.inf)
        for index, option in enumerate(options):
            if extra[index] >= states:
                continue
            costs = best[: states - extra[index]] + option.cost
            better = costs < new[extra[index] :]
            new[extra[index] :][better] = costs[better]
            chosen[number, extra[index] :][better] = index
        best = new
    left, picked = states - 1, [0] * len(items)
    for number in reversed(range(len(items))):
        picked[number] = int(chosen[number, left])
        left -= extras[number][picked[number]]
    found = _choice(items, picked, -math.inf)
    return _choice(items, picked, found.cost)


class _Step(NamedTuple):
    """A step from one option of an item's hull to the next; the one that saves most per byte sorts first."""

    loss: float
    """The cost saved per byte, negated."""
    item: int
    place: int
    """Index in the item's hull of the option that the step leads to."""
    nbytes: int


def _along_hulls(items: Sequence[Sequence[Option]], spare: int) -> Choice:
    hulls = [hull(options) for options in items]
    steps = sorted(
        _Step(-_gain(items[i], smaller, larger), i, place, items[i][larger].nbytes - items[i][smaller].nbytes)
        for i, kept in enumerate(hulls)
        for place, (smaller, larger) in enumerate(itertools.pairwise(kept), 1)
    )
    reached = [0] * len(items)
    bound = sum(options[kept[0]].cost for options, kept in zip(items, hulls, strict=True))
    relaxed = True
    stuck: set[int] = set()
    for step in steps:
        if relaxed:  # the relaxed problem takes the first step that does not fit in part, and no more
            bound += step.loss * min(step.nbytes, spare)
        if step.item in stuck:
            continue
        if step.nbytes > spare:
            relaxed = False
            stuck.add(step.item)
            continue
        spare -= step.nbytes
        reached[step.item] = step.place
    picked = [kept[place] for kept, place in zip(hulls, reached, strict=True)]
    return _choice(items, picked, bound)


def _choice(items: Sequence[Sequence[Option]], picked: Sequence[int], bound: float) -> Choice:
    options = [options[index] for options, index in zip(items, picked, strict=True)]
    cost = math.fsum(option.cost for option in options)
    return Choice(tuple(picked), sum(option.nbytes for option in options), cost, min(bound, cost))
