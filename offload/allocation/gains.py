"""Measures how much an error in a layer's output harms the model's predictions.

Noise of a known size is added to one layer's routed output, and the predictions are compared with those
without noise. Each row of a batch gets noise in a different layer, so that a model that streams through
memory is read only a few times, not once per layer. The harm of small errors is proportional to their squared
size, so one figure per layer is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_local.offload.allocation.samples import experts_of
from moe_local.offload.experts import OffloadedExperts, Runner

NOISE = 0.3
"""Norm of the noise relative to that of a token's routed output, as formats of 2 to 3 bits cause it. With 0.1
the few tokens whose chosen experts change outweigh the others, and mixes chosen by it have up to a third more
error (demo model)."""
TOKENS = 64
"""Tokens in a row."""
ROWS = 32
"""Rows in a forward: 2048 tokens, for which every expert is read at most once."""


@torch.inference_mode()
def layer_gains(
    hf: Any, texts: torch.Tensor, *, progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """For each MoE layer: KL divergence, in nats a token, for each unit of squared error in its output.

    `texts`: int64 [N, TOKENS], each row read by itself. The squared error is relative to the output of each
    token by itself: a few tokens have outputs a hundred times as large as the others', and would outweigh
    all of them. `progress(done, total)` counts forwards.
    """
    modules = experts_of(hf)
    generator = torch.Generator(device=hf.device).manual_seed(0)
    harm = [0.0] * len(modules)
    groups = [range(i, min(i + ROWS - 1, len(modules))) for i in range(0, len(modules), ROWS - 1)]
    for number, text in enumerate(texts):
        for at, group in enumerate(groups):
            noises = [_Noise(modules[layer], 1 + row, generator) for row, layer in enumerate(group)]
            for noise in noises:
                noise.begin()
            try:
                logits = hf(input_ids=text.to(hf.device).expand(1 + len(group), -1), use_cache=False).logits
            finally:
                for noise in noises:
                    noise.end()
            clean = logits[0].float().log_softmax(-1)
            for noise, layer in zip(noises, group, strict=True):
                changed = logits[noise.row].float().log_softmax(-1)
                harm[layer] += float((clean.exp() * (clean - changed)).sum(-1).mean())
            if progress is not None:
                progress(number * len(groups) + at + 1, len(texts) * len(groups))
    return [max(0.0, each) / NOISE**2 / len(texts) for each in harm]


class _Noise:
    """A Runner that wraps another one and adds noise to its output for one row of the batch."""

    def __init__(self, module: OffloadedExperts, row: int, generator: torch.Generator) -> None:
        self.row = row
        self._module = module
        self._runner: Runner | None = module.runner
        self._generator = generator

    def begin(self) -> None:
        self._module.attach(self)

    def end(self) -> None:
        self._module.attach(self._runner)

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        assert self._runner is not None
        output = self._runner.run(experts, hidden, index, weights).clone()
        mine = output[self.row * TOKENS : (self.row + 1) * TOKENS]
        noise = torch.randn(mine.shape, generator=self._generator, device=mine.device)
        noise *= NOISE * torch.linalg.vector_norm(mine.float(), dim=-1, keepdim=True) / mine.shape[-1] ** 0.5
        mine.copy_((mine.float() + noise).to(mine.dtype))
        return output


def texts_of(ids: Sequence[int], count: int) -> torch.Tensor:
    """At most `count` rows of TOKENS ids, int64, spread evenly over a longer text."""
    last = max(0, len(ids) - TOKENS)
    starts = [last * i // max(1, count - 1) for i in range(min(count, len(ids) // TOKENS))]
    return torch.tensor([list(ids[start : start + TOKENS]) for start in starts])
