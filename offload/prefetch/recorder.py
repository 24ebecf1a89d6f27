"""Records the residuals and the chosen experts of every MoE layer while a model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.prefetch.routers import RouterSite


class Recorder:
    """Hooks that keep the residuals and chosen experts of all MoE layers; a context manager around forwards.

    `residuals[layer]` and `chosen[layer]` are lists of tensors on the CPU, one for each forward: [T, D] in
    the model's dtype and [T, K] int64. Layers without a site keep no residuals.
    """

    def __init__(self, model: nn.Module, sites: Sequence[RouterSite | None]) -> None:
        self.residuals: list[list[torch.Tensor]] = [[] for _ in sites]
        self.chosen: list[list[torch.Tensor]] = [[] for _ in sites]
        self._model = model
        self._sites = sites
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Recorder:
        for layer, site in enumerate(self._sites):
            if site is not None:
                self._hooks.append(
                    site.norm.register_forward_pre_hook(self._keeper(self.residuals[layer], 0))
                )
        for module in self._model.modules():
            if isinstance(module, OffloadedExperts):
                self._hooks.append(
                    module.register_forward_pre_hook(self._keeper(self.chosen[module.index], 1))
                )
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _keeper(self, kept: list[torch.Tensor], argument: int) -> Callable[[nn.Module, Any], None]:
        def keep(module: nn.Module, args: Any) -> None:
            tensor = args[argument]
            kept.append(tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", copy=True))

        return keep
