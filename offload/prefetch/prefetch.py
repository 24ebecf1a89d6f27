"""Guessing which experts later layers will need: their routers, asked early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from moe_local.offload.prefetch.routers import RouterSite
from moe_local.offload.store import ExpertStore


class Guess(NamedTuple):
    """What a later layer will probably need."""

    layer: int
    distance: int
    """How many MoE layers ahead."""
    ranked: torch.Tensor
    """int64 [<= E experts of the layer], likeliest first, on the model's device; E where there is no more."""


class Prefetcher(Protocol):
    """Predicts and requests experts of later layers while a layer runs."""

    def predict(self, layer: int) -> list[Guess]:
        """Guesses made from the hidden state at this layer; no host sync."""

    def request(self, guesses: Sequence[Guess], experts: Sequence[Sequence[int]]) -> None:
        """Start to bring what the guesses (`ranked`, on the host) name and is absent."""

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        """What the hook on the norm before this layer's router would have seen, where hooks do not run."""

    def close(self) -> None:
        """Take the hooks off the model. Idempotent."""


class NoPrefetch:
    """The null twin: guesses nothing."""

    def predict(self, layer: int) -> list[Guess]:
        return []

    def request(self, guesses: Sequence[Guess], experts: Sequence[Sequence[int]]) -> None:
        pass

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        pass

    def close(self) -> None:
        pass


class RouterPrefetcher:
    """Applies the routers of the next layers, through their own norms, to the hidden state at hand.

    The residual stream changes little from layer to layer, so a later router's choice on today's state is
    mostly its choice on its own (measured by others: 70 to 90 % of the experts one layer ahead). For
    several tokens the experts are ranked by the router weight they get in all.

    `sites` are the routers in forward order, None where a layer cannot be predicted. Hooks on the norms
    keep the residual of the layer that runs; they hold no reference beyond the layer.
    """

    def __init__(
        self,
        store: ExpertStore,
        sites: Sequence[RouterSite | None],
        *,
        lookahead: int = 1,
        budget_experts: int = 0,
    ) -> None:
        """`budget_experts`: most experts under way at a time; 0: as many as a layer has slots."""
        self._store = store
        self._sites = sites
        self._lookahead = lookahead
        self._budget_experts = budget_experts
        self._residual: torch.Tensor | None = None
        self._residual_layer: int | None = None
        self._hooks = [
            site.norm.register_forward_pre_hook(self._keeper(layer))
            for layer, site in enumerate(sites)
            if site is not None
        ]

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        self._residual, self._residual_layer = residual, layer

    def predict(self, layer: int) -> list[Guess]:
        residual, self._residual = self._residual, None
        if residual is None or self._residual_layer != layer:
            return []
        guesses = []
        for distance in range(1, self._lookahead + 1):
            target = layer + distance
            site = self._sites[target] if target < len(self._sites) else None
            if site is None:
                continue
            weights, index = site.route(residual)
            ranked = index[0] if index.shape[0] == 1 else self._by_weight(target, index, weights)
            guesses.append(Guess(target, distance, ranked))
        return guesses

    def request(self, guesses: Sequence[Guess], experts: Sequence[Sequence[int]]) -> None:
        for guess, ranked in zip(guesses, experts, strict=True):
            slots, num_experts = self._store.slots(guess.layer), self._store.num_experts(guess.layer)
            wanted = [expert for expert in ranked if expert < num_experts][:slots]
            if not wanted:
                continue
            count = self._budget_experts or slots
            budget = count * max(self._store.layouts[guess.layer][expert].nbytes for expert in wanted)
            self._store.prefetch(guess.layer, wanted, distance=guess.distance, budget_bytes=budget)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _by_weight(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Those that some token chose, by the weight they get in all; E where there is no more of them."""
        num_experts = self._store.num_experts(layer)
        total = weights.new_zeros(num_experts, dtype=torch.float32)
        total.index_add_(0, index.flatten(), weights.flatten().float())
        total, order = total.topk(min(self._store.slots(layer), num_experts, index.numel()))
        return order.masked_fill(total <= 0, num_experts)

    def _keeper(self, layer: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.saw(layer, args[0])

        return keep
