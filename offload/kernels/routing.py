"""Which token goes to which experts in one forward of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate

import torch

from moe_local.cache.errors import MoeLocalError


class Routing:
    """The router's choice of K experts for each of T tokens, on the host.

    A *place* is token * K + rank: the row of [T * K, D] where the answer of that token's expert goes.
    """

    def __init__(self, ids: list[int], tokens: int, num_experts: int) -> None:
        """`ids`: T * K expert numbers below `num_experts`, token by token, in the router's order."""
        self.ids = ids
        self.tokens = tokens
        self.top_k = len(ids) // tokens if tokens else 0
        self.experts = list(dict.fromkeys(ids))
        if tokens == 1 and len(self.experts) < len(ids):  # only one of the expert's two places would be found
            raise MoeLocalError(
                f"a router chose an expert twice for one token, {ids}; its table or weights are damaged: "
                "get the checkpoint again"
            )
        self._num_experts = num_experts

    @cached_property
    def counts(self) -> list[int]:
        """How many tokens each expert of the layer has."""
        return torch.bincount(self._flat, minlength=self._num_experts).tolist()

    def tokens_of(self, expert: int) -> int:
        """How many tokens an expert that was chosen has."""
        return 1 if self.tokens == 1 else self.counts[expert]

    @cached_property
    def sorted_places(self) -> torch.Tensor:
        """All places, int64 [T * K] on the CPU, by expert and then by token."""
        return self._flat.argsort(stable=True)

    def span(self, expert: int) -> slice:
        """The expert's part of `sorted_places`."""
        end = self._ends[expert]
        return slice(end - self.counts[expert], end)

    def places_of(self, experts: Iterable[int]) -> tuple[list[int], torch.Tensor]:
        """Where each expert's places start (and, last, where they end) in their concatenation, and the
        concatenation."""
        if self.tokens == 1:
            ranks = [self.ids.index(expert) for expert in experts]
            return list(range(len(ranks) + 1)), torch.tensor(ranks)
        spans = [self.span(expert) for expert in experts]
        starts = [0, *accumulate(span.stop - span.start for span in spans)]
        return starts, torch.cat([self.sorted_places[span] for span in spans])

    @cached_property
    def _flat(self) -> torch.Tensor:
        return torch.tensor(self.ids, dtype=torch.int64)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.counts))
