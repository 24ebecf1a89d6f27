"""A prefetcher, always on, of what later routers choose from the current hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_local.offload.prefetch.predictor import RouterPredictor
from moe_local.offload.prefetch.prefetch import Guess
from moe_local.offload.store.store import ExpertStore


class RouterPrefetcher:
    """Requests the experts that the routers of the next layers choose from the current hidden state.

    The residual stream changes little from layer to layer, so most of what a later router chooses from the
    current state it also chooses from its own (published measurements: 70 to 90 % of the experts one layer
    ahead). At most as many guessed experts are in flight at a time as a layer has slots.
    """

    def __init__(self, store: ExpertStore, predictor: RouterPredictor, *, lookahead: int = 1) -> None:
        self._store = store
        self._predictor = predictor
        self._lookahead = lookahead
        predictor.watch()

    def predict(self, layer: int, tokens: int) -> list[Guess]:
        return self._predictor.predict(layer, self._lookahead)

    def request(
        self,
        layer: int,
        needed: Sequence[int],
        guesses: Sequence[Guess],
        experts: Sequence[Sequence[int]],
    ) -> None:
        # The budget counts bytes in flight, so this layer's own misses are added to it. Otherwise they would
        # leave no room for guesses where layers miss as many experts as they have slots, although the link is
        # free as soon as those have arrived.
        cache, layouts = self._store.tier.cache, self._store.layouts[layer]
        demand = sum(layouts[expert].nbytes for expert in needed if not cache.is_resident(layer, expert))
        for guess, ranked in zip(guesses, experts, strict=True):
            slots, num_experts = self._store.slots(guess.layer), self._store.num_experts(guess.layer)
            wanted = [expert for expert in ranked if expert < num_experts][:slots]
            if not wanted:
                continue
            budget = slots * max(self._store.layouts[guess.layer][expert].nbytes for expert in wanted)
            self._store.prefetch(guess.layer, wanted, distance=guess.distance, budget_bytes=demand + budget)

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        self._predictor.saw(layer, residual)

    def close(self) -> None:
        self._predictor.ignore()
