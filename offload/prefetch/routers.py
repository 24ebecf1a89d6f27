"""A model's routers, in the form in which prefetchers call them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moe_local.offload.prefetch.correction import Correction


@dataclass(frozen=True, slots=True)
class RouterSite:
    """The router of one MoE layer and the norm whose output it reads."""

    router: nn.Module
    norm: nn.Module

    def route(
        self, residual: torch.Tensor, correction: Correction | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream [..., D] -> (weights [T, K], experts [T, K]) as the router would choose.

        Calls `forward` directly: calling the modules would run the hooks from which this is called.
        """
        x = self.read(residual)
        if correction is not None:
            x = correction.apply(x)
        return chosen(self.router.forward(x))

    def read(self, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream [..., D] -> the router's input [T, D], on the norm's device."""
        weight = next(self.norm.parameters(), residual)
        normed: torch.Tensor = self.norm.forward(residual.to(weight.device))
        return normed.reshape(-1, normed.shape[-1])

    @property
    def weight(self) -> torch.Tensor | None:
        """The router's matrix [E, D]; None unless its logits are its input times one matrix (and a bias)."""
        found = [p for p in self.router.parameters() if p.dim() == 2]
        return found[0].detach() if len(found) == 1 and found[0].is_floating_point() else None


def chosen(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts) of a router's outputs: experts are the integer tensor, weights the float tensor of
    the same shape."""
    index = next(t for t in outputs if not t.is_floating_point())
    weights = next(t for t in outputs if t.is_floating_point() and t.shape == index.shape)
    return weights, index


def router_of(model: nn.Module, experts_name: str) -> nn.Module | None:
    """The router beside an experts module: its sibling called gate or router."""
    parent = model.get_submodule(experts_name.rpartition(".")[0])
    for name in ("gate", "router"):
        router = getattr(parent, name, None)
        if isinstance(router, nn.Module):
            return router
    return None
