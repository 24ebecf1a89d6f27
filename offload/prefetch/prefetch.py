"""Guessing which experts later layers will need: what all ways of doing it have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class Guess(NamedTuple):
    """What a later layer will probably need."""

    layer: int
    distance: int
    """How many MoE layers ahead."""
    ranked: torch.Tensor
    """int64 [<= E experts of the layer], likeliest first; E where there is no more. On the model's device, so
    that nobody waits for it, or on the CPU, if it was made there."""


class Prefetcher(Protocol):
    """Predicts and requests experts of later layers while a layer runs."""

    def predict(self, layer: int, tokens: int) -> list[Guess]:
        """Guesses made from the hidden state at this layer, which computes so many tokens; no host sync."""

    def request(
        self,
        layer: int,
        needed: Sequence[int],
        guesses: Sequence[Guess],
        experts: Sequence[Sequence[int]],
    ) -> None:
        """Start to bring what the guesses (`ranked`, on the host) name and is absent.

        `needed` are the experts that the layer itself computes with.
        """

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        """What the hook on the norm before this layer's router would have seen, where hooks do not run."""

    def close(self) -> None:
        """Take the hooks off the model. Idempotent."""


class NoPrefetch:
    """The Prefetcher that guesses nothing."""

    def predict(self, layer: int, tokens: int) -> list[Guess]:
        return []

    def request(
        self,
        layer: int,
        needed: Sequence[int],
        guesses: Sequence[Guess],
        experts: Sequence[Sequence[int]],
    ) -> None:
        pass

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        pass

    def close(self) -> None:
        pass
