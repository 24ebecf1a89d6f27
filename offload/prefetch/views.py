"""Adapters that give routers with other signatures the form hidden state -> outputs with weights [T, K] and
experts [T, K]."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class GivenMore(nn.Module):
    """A router that takes, beside the hidden state, tensors of the model that are the same in each call.

    MiniMax M2 and LFM2 keep the correction of each expert's score outside the router.
    """

    def __init__(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.router = router
        self._args, self._kwargs = args, kwargs

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.router.forward(hidden_states, *self._args, **self._kwargs)


class ByToken(nn.Module):
    """A router that chooses by token ids, so that its choice is known before its layer runs.

    The first layers of DeepSeek V4 have such routers. `source` holds the ids that the model is computing now:
    they are recorded when the first router of this kind is called, before any of them is used to predict.
    """

    def __init__(self, router: nn.Module, source: TokenIds) -> None:
        super().__init__()
        self.router = router
        self._source = source

    def forward(self, hidden_states: torch.Tensor) -> Any:
        ids = self._source.ids
        assert ids is not None, "asked before any token was computed"
        return self.router.forward(hidden_states, ids)


class TokenIds:
    """Keeps the token ids, int64 [B, T], with which a router was last called."""

    def __init__(self, router: nn.Module) -> None:
        self.ids: torch.Tensor | None = None
        self.hook = router.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ids = next(iter([*args[1:], *kwargs.values()]))


class OneBatch(nn.Module):
    """A router that wants its input [B, T, D], as AFMoE's does."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.router.forward(hidden_states.unsqueeze(0))


class Ranked(nn.Module):
    """A router that returns a number for every expert, larger for those it prefers; the top k are taken.

    Llama 4's scores are -inf or 0 for all experts that were not chosen, so its logits give
    the order; Switch Transformers mark the chosen expert.
    """

    def __init__(self, router: nn.Module, top_k: int) -> None:
        super().__init__()
        self.router = router
        self.top_k = top_k

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs = self.router.forward(hidden_states)
        logits = outputs[-1] if isinstance(outputs, tuple) else outputs
        chosen, index = logits.reshape(-1, logits.shape[-1]).topk(self.top_k, dim=-1)
        return logits, chosen.float().sigmoid(), index


class NoNorm(nn.Module):
    """The norm of the site of a router that reads the residual stream itself, as Gemma's does."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self._seen = router

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Register the hook on the router, whose input is the residual stream."""
        return self._seen.register_forward_pre_hook(*args, **kwargs)

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        return residual
