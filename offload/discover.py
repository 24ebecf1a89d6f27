"""Learning a model's wiring from one token: what feeds each router, and the shapes of its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_local.offload.experts import OffloadedExperts


@dataclass(frozen=True, slots=True)
class RouterSite:
    """The router of one MoE layer and the norm whose output it reads (identity where it reads the residual)."""

    router: nn.Module
    norm: nn.Module

    def route(self, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream [..., D] -> (weights [T, K], experts [T, K]) as the router would choose.

        Calls `forward` directly: calling the modules would run the very hooks this is used in.
        """
        normed = self.norm.forward(residual)
        outputs = self.router.forward(normed.reshape(-1, normed.shape[-1]))
        return chosen(outputs)


def chosen(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts) among a router's outputs: the integer tensor, and the float one of its shape."""
    index = next(t for t in outputs if not t.is_floating_point())
    weights = next(t for t in outputs if t.is_floating_point() and t.shape == index.shape)
    return weights, index


class Probe:
    """Hooks that watch one forward pass of a model whose experts answer zeros.

    Used as a context manager around any forward; afterwards `sites` says for each MoE layer which norm's
    output its router read. None for a layer whose router takes more than the hidden state, or whose input
    no norm made: such a layer is not predicted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made_by: dict[int, nn.Module] = {}
        self._kept: list[torch.Tensor] = []  # keeps the outputs alive, so that no address is used twice
        self.sites: list[RouterSite | None] = []

    def __enter__(self) -> Probe:
        self._hooks = []
        for name, module in self._model.named_modules():
            if "norm" in name.rsplit(".", 1)[-1].lower():
                self._hooks.append(module.register_forward_hook(self._made))
            if isinstance(module, OffloadedExperts):
                self.sites.append(None)
                router = router_of(self._model, name)
                if router is not None:
                    self._hooks.append(
                        router.register_forward_hook(self._asked(len(self.sites) - 1), with_kwargs=True)
                    )
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._made_by.clear()
        self._kept.clear()

    def _made(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        self._made_by[tensor.data_ptr()] = module
        self._kept.append(tensor)

    def _asked(self, index: int) -> Callable[..., None]:
        def asked(router: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            norm = self._made_by.get(args[0].data_ptr()) if args else None
            tensors = [t for t in output if torch.is_tensor(t)] if isinstance(output, tuple) else []
            integer = [t for t in tensors if not t.is_floating_point()]
            if norm is not None and len(args) == 1 and not kwargs and len(integer) == 1:
                weights = [t for t in tensors if t.is_floating_point() and t.shape == integer[0].shape]
                if weights:
                    self.sites[index] = RouterSite(router, norm)

        return asked


def router_of(model: nn.Module, experts_name: str) -> nn.Module | None:
    """The router beside an experts module: its sibling called gate or router."""
    parent = model.get_submodule(experts_name.rpartition(".")[0])
    for name in ("gate", "router"):
        router = getattr(parent, name, None)
        if isinstance(router, nn.Module):
            return router
    return None
