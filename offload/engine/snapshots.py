"""Copies of the states of rows, in RAM. A state has no past, so a row can be cut only to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from moe_local.offload.plan.footprint import SNAPSHOTS


class Snapshot(NamedTuple):
    """A row's states after its first `length` tokens, one tensor for each of the slab's."""

    length: int
    states: list[torch.Tensor]


class Snapshots:
    """Up to SNAPSHOTS a row, by length. Owns their memory, which it keeps for later ones."""

    def __init__(self, slab: Sequence[torch.Tensor], rows: int) -> None:
        """`slab`: all state tensors, each of shape [rows, ...]; borrowed."""
        self._slab = slab
        self._of: list[list[Snapshot]] = [[] for _ in range(rows)]
        self._spare: list[list[torch.Tensor]] = []

    def longest(self, row: int, limit: int) -> int:
        """The greatest length of at most `limit` at which one was taken; 0: none."""
        return max((each.length for each in self._of[row] if each.length <= limit), default=0)

    def take(self, row: int, length: int) -> None:
        """Take a snapshot of a row's present states, those after `length` tokens."""
        self.put(row, Snapshot(length, [tensor[row] for tensor in self._slab]))

    def put(self, row: int, snapshot: Snapshot) -> None:
        """Copy a snapshot of more tokens than those that the row has.

        Beyond SNAPSHOTS, one gives way: that without which the fewest tokens would have to be computed again.
        """
        kept = self._of[row]
        if len(kept) == SNAPSHOTS:
            lengths = [0, *(each.length for each in kept)]
            gaps = [after - before for before, after in pairwise(lengths)]
            self._spare.append(kept.pop(gaps.index(min(gaps))).states)
        if self._spare:
            states = self._spare.pop()
        else:
            with torch.inference_mode(False):
                states = [torch.empty_like(tensor[0], device="cpu") for tensor in self._slab]
        for state, source in zip(states, snapshot.states, strict=True):
            state.copy_(source)
        kept.append(Snapshot(snapshot.length, states))

    def of(self, row: int) -> list[Snapshot]:
        """Those of a row, by length; borrowed."""
        return self._of[row]

    def at(self, row: int, length: int) -> list[torch.Tensor]:
        """The states after the first `length` tokens of a row, at which a snapshot was taken."""
        return next(each.states for each in self._of[row] if each.length == length)

    def cut(self, row: int, length: int) -> None:
        """Drop those of more than `length` tokens."""
        kept = self._of[row]
        while kept and kept[-1].length > length:
            self._spare.append(kept.pop().states)

    def swap(self, one: int, other: int) -> None:
        self._of[one], self._of[other] = self._of[other], self._of[one]

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        held = [*self._spare, *(each.states for kept in self._of for each in kept)]
        return sum(state.nbytes for states in held for state in states)

    def check_integrity(self, lens: Sequence[int]) -> None:
        """Raises AssertionError when the bookkeeping contradicts itself. `lens`: tokens of rows in use."""
        for row, kept in enumerate(self._of):
            lengths = [each.length for each in kept]
            assert lengths == sorted({*lengths}), lengths
            assert len(kept) <= SNAPSHOTS
            assert all(0 < length <= lens[row] for length in lengths), (row, lengths)
