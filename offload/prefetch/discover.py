"""Learning a model's wiring from one token: which norm feeds each router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.prefetch.routers import RouterSite, router_of


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
