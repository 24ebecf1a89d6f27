"""Finds out, from a forward of one token, which norm feeds each router of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.prefetch.routers import RouterSite, router_of
from moe_local.offload.prefetch.views import ByToken, GivenMore, NoNorm, OneBatch, Ranked, TokenIds


class Probe:
    """Hooks that watch one forward pass of a model whose experts answer zeros.

    Used as a context manager around any forward; afterwards `sites` says for each MoE layer which norm's
    output its router read, and how to call that router (`prefetch.views`). A layer's site is None if its
    router takes some other input that changes, or if no norm made its input: such a layer is not predicted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made_by: dict[int, nn.Module] = {}
        self._kept: list[torch.Tensor] = []  # keeps the outputs alive, so that no address is reused
        self._own: list[torch.Tensor] = []
        self._experts: list[OffloadedExperts] = []
        self._ids: TokenIds | None = None
        self.sites: list[RouterSite | None] = []

    def __enter__(self) -> Probe:
        self._hooks = []
        self._own = [*self._model.parameters(), *self._model.buffers()]
        for name, module in self._model.named_modules():
            if "norm" in name.rsplit(".", 1)[-1].lower():
                self._hooks.append(module.register_forward_hook(self._made))
            if isinstance(module, OffloadedExperts):
                self.sites.append(None)
                self._experts.append(module)
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
        self._own = []
        self._kept.clear()

    def _made(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        self._made_by[tensor.data_ptr()] = module
        self._kept.append(tensor)

    def _asked(self, index: int) -> Callable[..., None]:
        experts = self._experts[index]

        def asked(router: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            view = self._view(router, args, kwargs, output, experts)
            norm = self._made_by.get(args[0].data_ptr()) if args else None
            if norm is None and any("norm" in name for name, _ in router.named_children()):
                norm = NoNorm(router)
            if view is not None and norm is not None and not isinstance(view, ByToken):
                view = _takes_rows(view, args[0])
            if view is not None and norm is not None:
                self.sites[index] = RouterSite(view, norm)

        return asked

    def _view(
        self, router: nn.Module, args: Any, kwargs: Any, output: Any, experts: OffloadedExperts
    ) -> nn.Module | None:
        """A view of the router that takes the hidden state alone and returns weights and experts, if any."""
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(t)]
        more = [*args[1:], *kwargs.values()]
        if _choice(tensors, experts.num_experts):
            if not more:
                return router
            if all(any(given is own for own in self._own) for given in more):
                return GivenMore(router, args[1:], kwargs)
            if len(more) == 1 and torch.is_tensor(more[0]) and more[0].dtype == torch.int64:
                if self._ids is None:
                    self._ids = TokenIds(router)
                return ByToken(router, self._ids)
            return None
        top_k = getattr(router, "top_k", 1)
        if not more and tensors and tensors[-1].shape[-1] == experts.num_experts and isinstance(top_k, int):
            return Ranked(router, top_k)
        return None


@torch.no_grad()
def _takes_rows(view: nn.Module, x: torch.Tensor) -> nn.Module | None:
    """The view, or an adapter, that takes the router's input x [..., D] as rows [T, D]; None if neither
    does."""
    rows = x.reshape(-1, x.shape[-1])
    for each in (view, OneBatch(view)):
        try:
            each.forward(rows)
        except (ValueError, RuntimeError, IndexError, TypeError):
            continue
        return each
    return None


def _choice(tensors: list[torch.Tensor], num_experts: int) -> bool:
    """Whether these tensors hold chosen experts, integers [T, K], and weights of the same shape."""
    integer = [t for t in tensors if not t.is_floating_point()]
    if len(integer) != 1 or integer[0].dim() != 2 or integer[0].shape[-1] == num_experts:
        return False
    return any(t.is_floating_point() and t.shape == integer[0].shape for t in tensors)
