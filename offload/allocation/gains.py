"""How much an error in a layer's output harms the model's predictions, measured.

Noise of a known size is added to one layer's routed output, and the predictions are compared with those
without. Rows of one batch are given noise in different layers, so that a model that streams through memory is
read a few times in all, not once a layer. The harm of small errors grows with their squared size, so one
figure a layer is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_local.offload.allocation.samples import experts_of
from moe_local.offload.experts import OffloadedExperts, Runner

NOISE = 0.3
"""Of the norm of a token's routed output: what formats of 2 to 3 bits do. With 0.1 the few tokens whose
experts change outweigh the others, and mixes chosen by it err up to a third more (demo model)."""
TOKENS = 64
"""In a row."""
ROWS = 32
"""Of a forward: 2048 tokens, for which every expert is read at most once."""


@torch.inference_mode()
def layer_gains(
    hf: Any, texts: torch.Tensor, *, progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """For each MoE layer: KL divergence, in nats a token, for each unit of squared error in its output.

    `texts`: int64 [N, TOKENS], each read by itself. Squared error: relative to the output, of every token: a
    few tokens have outputs a hundred times as large as the others', and would outweigh all of them.
    `progress` gets forwards done and in all.
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
    """A Runner that lets another run and adds noise to one row of the batch."""

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
    """`count` rows of TOKENS ids, int64, spread over a text that is longer."""
    last = max(0, len(ids) - TOKENS)
    starts = [last * i // max(1, count - 1) for i in range(min(count, len(ids) // TOKENS))]
    return torch.tensor([list(ids[start : start + TOKENS]) for start in starts])
