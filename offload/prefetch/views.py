"""Routers of other forms, seen as (what they read) -> (logits, weights [T, K], experts [T, K])."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class GivenMore(nn.Module):
    """A router that is given tensors of the model beside the hidden state, the same ones each time.

    MiniMax M2 and LFM2 keep the router's correction of each expert's score beside the router.
    """

    def __init__(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.router = router
        self._args, self._kwargs = args, kwargs

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.router.forward(hidden_states, *self._args, **self._kwargs)


class ByToken(nn.Module):
    """A router that chooses by the ids of the tokens, so that its choice is known before its layer runs.

    The first layers of DeepSeek V4. It is asked about the ids that the model is computing now, which the
    first router of this kind has been given before any of them can be asked: hence `source`.
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
    """The ids, int64 [B, T], with which a router was called last."""

    def __init__(self, router: nn.Module) -> None:
        self.ids: torch.Tensor | None = None
        self.hook = router.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ids = next(iter([*args[1:], *kwargs.values()]))


class Ranked(nn.Module):
    """A router that answers with a number for every expert, larger for those it prefers.

    Llama 4's scores are -inf or 0 for all that were not chosen, and its logits are their order; Switch
    Transformers mark the one that was.
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
    """Stands where the norm would be of a router that reads the residual stream itself, as Gemma's does."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self._seen = router

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the router, which is called where a norm would be."""
        return self._seen.register_forward_pre_hook(*args, **kwargs)

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        return residual
