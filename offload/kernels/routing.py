"""Which token goes to which experts in one forward of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch


class Routing:
    """The router's choice for T tokens, K experts each, known to the host.

    A *place* is token * K + rank: the row of [T * K, D] where the answer of that token's expert goes.
    """

    def __init__(self, ids: list[int], tokens: int, num_experts: int) -> None:
        """`ids`: T * K expert numbers below `num_experts`, token by token, in the router's order."""
        self.ids = ids
        self.tokens = tokens
        self.top_k = len(ids) // tokens if tokens else 0
        self.experts = list(dict.fromkeys(ids))
        self._num_experts = num_experts
        self._counts: list[int] | None = None

    @property
    def counts(self) -> list[int]:
        """How many tokens each expert of the layer has."""
        if self._counts is None:
            self._sort()
            assert self._counts is not None
        return self._counts

    def places(self, expert: int) -> torch.Tensor:
        """The expert's places, int64 on the CPU, in the tokens' order."""
        if self.tokens == 1:
            return torch.tensor([place for place, chosen in enumerate(self.ids) if chosen == expert])
        end = self._ends[expert] if self._counts is not None else self._sort()[expert]
        return self._places[end - self.counts[expert] : end]

    def places_of(self, experts: Iterable[int]) -> tuple[list[int], torch.Tensor]:
        """Where each expert's places start in their concatenation, with the end last; and that."""
        if self.tokens == 1:
            place = {expert: rank for rank, expert in enumerate(self.ids)}
            ranks = [place[expert] for expert in experts]
            return list(range(len(ranks) + 1)), torch.tensor(ranks)
        parts = [self.places(expert) for expert in experts]
        return [0, *accumulate(part.numel() for part in parts)], torch.cat(parts)

    def _sort(self) -> list[int]:
        flat = torch.tensor(self.ids, dtype=torch.int64)
        self._counts = torch.bincount(flat, minlength=self._num_experts).tolist()
        self._ends = list(accumulate(self._counts))
        self._places = flat.argsort(stable=True)
        return self._ends
