"""A predictor of one's own: the next layer will need what it needed last time.

What is predicted is brought while the present layer computes. A wrong guess costs the link's time, never a
wrong answer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import moe_local
from moe_local import Guess

if TYPE_CHECKING:
    from moe_local.offload.store.store import ExpertStore


class LastTime:
    """Guesses for each layer the experts of its last step."""

    def __init__(self, store: "ExpertStore", routers: Sequence[Any]) -> None:
        self._store = store
        self._last: list[list[int]] = [[] for _ in routers]

    def predict(self, layer: int, tokens: int) -> list[Guess]:
        target = layer + 1
        if target >= len(self._last) or not self._last[target]:
            return []
        return [Guess(target, 1, torch.tensor(self._last[target]))]

    def request(
        self,
        layer: int,
        needed: Sequence[int],
        guesses: Sequence[Guess],
        experts: Sequence[Sequence[int]],
    ) -> None:
        self._last[layer] = list(needed)
        for guess, wanted in zip(guesses, experts, strict=True):
            budget = sum(self._store.layouts[guess.layer][expert].nbytes for expert in wanted)
            self._store.prefetch(guess.layer, wanted, distance=guess.distance, budget_bytes=budget)

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        """Nothing: this predictor does not look at hidden states."""

    def close(self) -> None:
        """Nothing is held."""


def main() -> None:
    moe_local.register_prefetcher("last-time", LastTime)
    for prefetch in ("last-time", "router", "off"):
        with moe_local.load("demo", slots=4, prefetch=prefetch) as model:
            model.generate("Why does prefetch help?", max_new_tokens=64)
            stats = model.stats()
        guesses = stats.prefetch
        print(f"{prefetch}: {stats.misses} misses, {guesses.used} of {guesses.issued} guesses used")


if __name__ == "__main__":
    main()
