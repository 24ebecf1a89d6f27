"""Records, while a model reads a text, how often each expert is used, and a sample of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from moe_local.offload.experts import OffloadedExperts, Runner

WINDOW = 256
"""Tokens of text in one row of a forward."""
MOST_BYTES = 1 << 30
"""Most bytes of inputs kept in RAM, over all experts."""
TINY = 1e-30
MOST_INPUTS, FEWEST_INPUTS = 96, 8
"""Inputs kept for each expert: more would hardly make the mean error more certain, fewer would say little."""


class LayerSamples:
    """One layer's number of tokens, and for each expert its number of uses and a random sample of its inputs.

    Reservoir sampling: every input draws a random number, and those with the smallest are kept.
    """

    def __init__(self, num_experts: int, most: int, generator: torch.Generator) -> None:
        self.tokens = 0
        self.uses = [0] * num_experts
        self._most = most
        self._generator = generator
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = [None] * num_experts

    def see(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Record one call of the layer's experts: hidden and output [T, D], index and weights [T, K]."""
        norms = torch.linalg.vector_norm(output.detach().float(), dim=-1, keepdim=True)
        weights = (weights.detach().float() / norms.clamp_min(TINY)).cpu()
        hidden, index = hidden.detach().cpu(), index.cpu()
        self.tokens += hidden.shape[0]
        drawn = torch.rand(index.shape, generator=self._generator)
        for expert in range(len(self.uses)):
            rows, ranks = (index == expert).nonzero(as_tuple=True)
            self.uses[expert] += len(rows)
            if len(rows):
                self._keep(expert, drawn[rows, ranks], hidden[rows], weights[rows, ranks])

    def inputs(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled inputs of the expert, [N, D], and the factors, [N] fp32, that make its outputs relative to
        the layer's output: the router's weight divided by the norm of that output. N may be 0."""
        kept = self._kept[expert]
        if kept is None:
            return torch.empty(0, 0), torch.empty(0)
        return kept[1], kept[2]

    def others(self, expert: int, count: int) -> torch.Tensor:
        """At most `count` sampled inputs of the layer's other experts, [N, D], taken evenly from all."""
        found = [kept[1] for e, kept in enumerate(self._kept) if kept is not None and e != expert]
        if not found:
            return torch.empty(0, 0)
        every = torch.cat([inputs[: -(-count // len(found))] for inputs in found])
        return every[:count]

    def usual_weight(self) -> float:
        """The root mean square of the factors of all kept inputs (see `inputs`)."""
        found = [kept[2] for kept in self._kept if kept is not None]
        return float(torch.cat(found).square().mean().sqrt()) if found else 0.0

    def _keep(self, expert: int, drawn: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
        kept = self._kept[expert]
        if kept is not None:
            drawn, x, weights = (torch.cat(pair) for pair in zip(kept, (drawn, x, weights), strict=True))
        if len(drawn) > self._most:
            order = drawn.argsort()[: self._most]
            drawn, x, weights = drawn[order], x[order], weights[order]
        self._kept[expert] = drawn, x.clone(), weights


class Watch:
    """A context manager that records the calls of a model's experts, each layer's in its LayerSamples.

    Memory: MOST_BYTES at most, however long the text, unless FEWEST_INPUTS of every expert take more.
    """

    def __init__(self, modules: Sequence[OffloadedExperts]) -> None:
        self.layers: list[LayerSamples] = []
        self._modules = modules
        self._generator = torch.Generator().manual_seed(0)
        self._runners: list[Runner | None] = []

    def __enter__(self) -> Watch:
        self._runners = [module.runner for module in self._modules]
        for module, runner in zip(self._modules, self._runners, strict=True):
            assert runner is not None
            module.attach(_Watching(runner, self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, runner in zip(self._modules, self._runners, strict=True):
            module.attach(runner)

    def see(self, module: OffloadedExperts, hidden: torch.Tensor, *rest: torch.Tensor) -> None:
        if not self.layers:
            counts = [each.num_experts for each in self._modules]
            room = MOST_BYTES // (sum(counts) * hidden.shape[-1] * hidden.element_size())
            most = min(MOST_INPUTS, max(FEWEST_INPUTS, room))
            self.layers = [LayerSamples(count, most, self._generator) for count in counts]
        self.layers[module.index].see(hidden, *rest)


class _Watching:
    """A Runner that wraps another one and reports its inputs and outputs to a Watch."""

    def __init__(self, runner: Runner, watch: Watch) -> None:
        self._runner = runner
        self._watch = watch

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        output = self._runner.run(experts, hidden, index, weights)
        self._watch.see(experts, hidden, index, weights, output)
        return output


def experts_of(hf: Any) -> list[OffloadedExperts]:
    """The experts modules of a loaded model (Model.hf), by layer."""
    found = [module for module in hf.modules() if isinstance(module, OffloadedExperts)]
    return sorted(found, key=lambda module: module.index)


def rows_of(ids: Sequence[int], most: int) -> torch.Tensor:
    """The first `most` ids of a text in rows, int64 [N, WINDOW]; a shorter last row is left out."""
    count = min(len(ids), most) // WINDOW
    return torch.tensor(list(ids[: count * WINDOW])).view(count, WINDOW)
