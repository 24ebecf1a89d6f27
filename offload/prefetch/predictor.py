"""Predicts a later layer's experts by running its router on an earlier layer's hidden state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from moe_local.offload.modeling.onlooker import Onlooker
from moe_local.offload.prefetch.correction import Correction
from moe_local.offload.prefetch.prefetch import Guess
from moe_local.offload.prefetch.routers import RouterSite
from moe_local.offload.store.store import ExpertStore


class RouterPredictor:
    """Applies the norms and routers of the next layers to the current layer's hidden state.

    For several tokens the experts are ranked by their router weight summed over the tokens. Where there is a
    `Correction` for a layer and a distance, it is applied to what the router reads.

    `sites` are the routers in forward order, None where a layer cannot be predicted. After `watch`, hooks on
    the norms keep the residual of the current layer (`saw`); no reference is held after `predict`.
    """

    def __init__(
        self,
        store: ExpertStore,
        sites: Sequence[RouterSite | None],
        corrections: Mapping[tuple[int, int], Correction] | None = None,
    ) -> None:
        """`corrections` by (layer whose residual is known, layers ahead)."""
        self._store = store
        self._sites = sites
        self._corrections = corrections or {}
        self._residual: torch.Tensor | None = None
        self._residual_layer: int | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def layers(self) -> int:
        return len(self._sites)

    def watch(self) -> None:
        """Keep residuals from now on. Idempotent."""
        if not self._hooks:
            self._hooks = [
                site.norm.register_forward_pre_hook(Onlooker(partial(self.saw, layer)))
                for layer, site in enumerate(self._sites)
                if site is not None
            ]

    def ignore(self) -> None:
        """Remove the hooks from the model, so that watching costs nothing. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._residual = [], None

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        """Keep `residual` [..., D], the input of the norm before this layer's router in the current step."""
        self._residual, self._residual_layer = residual, layer

    def predict(self, layer: int, lookahead: int) -> list[Guess]:
        """Guesses for the next `lookahead` layers from the residual of `layer`, if that was seen last."""
        residual, self._residual = self._residual, None
        if residual is None or self._residual_layer != layer:
            return []
        guesses = []
        for distance in range(1, lookahead + 1):
            target = layer + distance
            site = self._sites[target] if target < len(self._sites) else None
            if site is None:
                continue
            weights, index = site.route(residual, self._corrections.get((layer, distance)))
            ranked = index[0] if index.shape[0] == 1 else self._by_weight(target, index, weights)
            guesses.append(Guess(target, distance, ranked))
        return guesses

    def rehearse(self, clock: Callable[[], float]) -> float:
        """Measure the host's seconds of guessing one layer ahead in all layers of a one-token step."""
        best = 0.0
        with torch.inference_mode():
            for layer, site in enumerate(self._sites[1:]):
                parameter = next(site.norm.parameters(), None) if site is not None else None
                if parameter is None:
                    continue
                residual = parameter.new_zeros(1, 1, parameter.shape[-1])
                times = []
                for _ in range(3):
                    start = clock()
                    self.saw(layer, residual)
                    self.predict(layer, 1)
                    times.append(clock() - start)
                best += min(times)
        return best

    def _by_weight(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts that some token chose, by summed weight, padded with E (the number of experts)."""
        num_experts = self._store.num_experts(layer)
        total = weights.new_zeros(num_experts, dtype=torch.float32)
        total.index_add_(0, index.flatten(), weights.flatten().float())
        total, order = total.topk(min(self._store.slots(layer), num_experts, index.numel()))
        return order.masked_fill(total <= 0, num_experts)
