"""The protocol of prefetchers, which guess the experts that later layers will need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class Guess(NamedTuple):
    """The experts that a later layer will probably need."""

    layer: int
    distance: int
    """How many MoE layers ahead."""
    ranked: torch.Tensor
    """int64 [<= E], likeliest expert first, padded with E, the layer's number of experts. On the model's
    device, so that making it needs no synchronization, or on the CPU, if it was made there."""


class Prefetcher(Protocol):
    """Predicts and requests experts of later layers while a layer runs."""

    def predict(self, layer: int, tokens: int) -> list[Guess]:
        """Guesses from the hidden state at this layer, which computes `tokens` tokens; no host sync."""

    def request(
        self,
        layer: int,
        needed: Sequence[int],
        guesses: Sequence[Guess],
        experts: Sequence[Sequence[int]],
    ) -> None:
        """Start loading the guessed experts that are absent.

        `experts[i]` is `guesses[i].ranked` on the host; `needed` are the experts that `layer` itself needs.
        """

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        """Called with the input of the norm before this layer's router where the hook on it does not run."""

    def close(self) -> None:
        """Remove the hooks from the model. Idempotent."""


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
