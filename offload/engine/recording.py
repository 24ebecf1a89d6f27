"""A forward of one token, captured in segments: between two, the experts of a layer run as ever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import torch

from moe_local.offload.engine.graphs import Graph, Graphs
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.gpu.card_moves import moves_of
from moe_local.offload.prefetch.routers import RouterSite

Saw = Callable[[int, torch.Tensor], None]
"""Told of a layer and of the residual that the norm before its router is given: a Prefetcher's `saw`."""


class Between(Protocol):
    """What is done between two segments, from and into tensors that stay where they are."""

    def run(self) -> None:
        """Do it, behind what the devices were given before."""


class Pause:
    """The experts of one layer, on tensors that stay where they are.

    Holds what the segment before it leaves, for as long as it is replayed: the pool would give that memory
    to a later segment otherwise.
    """

    def __init__(
        self,
        module: OffloadedExperts,
        arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        residual: torch.Tensor | None,
        saw: Saw | None,
    ) -> None:
        """`arguments`: hidden [1, D], index and weights [1, K]. `residual` as for `saw`."""
        self._module = module
        self._arguments = arguments
        self._residual = residual
        self._saw = saw
        self.output = torch.empty_like(arguments[0])
        """[1, D], which the segment behind it reads."""

    def run(self) -> None:
        if self._residual is not None and self._saw is not None:
            self._saw(self._module.index, self._residual)  # hooks do not run in a replay
        self.output.copy_(self._module.answer(*self._arguments))


class Crossing:
    """Tensors on their way to another card. Holds both ends, as a Pause does."""

    def __init__(self, tensors: Sequence[torch.Tensor], card: torch.device) -> None:
        self._tensors = list(tensors)
        self.outputs = [torch.empty_like(tensor, device=card) for tensor in tensors]
        """The same on the card, as of the last `run`."""

    def run(self) -> None:
        for tensor, output in zip(self._tensors, self.outputs, strict=True):
            output.copy_(tensor)  # between cards torch has each one's current stream wait for the other's


class CapturedStep:
    """A forward that can be repeated for other contents of the tensors that it read."""

    def __init__(
        self,
        segments: Sequence[Graph],
        between: Sequence[Between],
        counted: Sequence[OffloadedExperts],
        logits: torch.Tensor,
    ) -> None:
        """`counted`: modules whose experts are captured, too, and which are told of every replay."""
        self._parts = list(zip_longest(segments, between))
        self._counted = tuple(counted)
        self.segments = len(segments)
        self.logits = logits
        """[1, vocabulary] fp32, as of the last replay."""

    @property
    def is_valid(self) -> bool:
        """Whether the experts that were captured are where they were."""
        return all(module.stays_captured for module in self._counted)

    def replay(self) -> None:
        """Only while it `is_valid`. Raises what the experts of a layer raise; a later replay begins anew."""
        for segment, between in self._parts:
            segment.replay()
            if between is not None:
                between.run()
        for module in self._counted:
            module.count_replay()


class Recording:
    """The capture of one forward. Each segment is replayed as soon as it is complete, so the forward counts.

    The modules that hold experts find it in their `seam` while it is `attached`, and let it run them; so do
    the CardMoves of a model on several cards, each of which has segments of its own.
    """

    def __init__(
        self, graphs: Graphs, hf: Any, sites: Sequence[RouterSite | None] = (), saw: Saw | None = None
    ) -> None:
        """`sites`: the routers by layer; the residuals before their norms are what `saw` is told of."""
        self._graphs = graphs
        self._modules = [module for module in hf.modules() if isinstance(module, OffloadedExperts)]
        self._moves = moves_of(hf)
        self._sites = sites if saw is not None else ()
        self._saw = saw
        self._residuals: dict[int, torch.Tensor] = {}
        self._segments: list[Graph] = []
        self._between: list[Between] = []
        self._counted: list[OffloadedExperts] = []
        self.in_experts = False
        """Whether what was raised came from a layer's experts, not from capturing."""

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [
            site.norm.register_forward_pre_hook(self._keeper(layer))
            for layer, site in enumerate(self._sites)
            if site is not None
        ]
        for module in self._modules:
            module.seam = self
        if self._moves is not None:
            self._moves.seam = self
        try:
            yield
        finally:
            if self._moves is not None:
                self._moves.seam = None
            for module in self._modules:
                module.seam = None
            for hook in hooks:
                hook.remove()

    def begin(self) -> None:
        self._graphs.begin()

    def run(
        self, module: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """A layer's experts: captured with the rest where that is possible, else between two segments."""
        if module.can_be_captured(hidden, index):
            self._counted.append(module)
            return module.answer(hidden, index, weights)
        self._end_segment()
        residual = self._residuals.pop(module.index, None)
        pause = Pause(module, (hidden, index, weights), residual, self._saw)
        self.in_experts = True
        pause.run()
        self.in_experts = False
        self._between.append(pause)
        self._graphs.begin()
        return pause.output

    def move(self, tensors: Sequence[torch.Tensor], card: torch.device) -> list[torch.Tensor]:
        """As a Mover: between two segments, the second of which is captured on `card`."""
        self._end_segment()
        crossing = Crossing(tensors, card)
        crossing.run()
        self._between.append(crossing)
        self._graphs.begin(card)
        return crossing.outputs

    def finish(self, logits: torch.Tensor) -> CapturedStep:
        """The forward is over, and `logits` are what it gave."""
        self._end_segment()
        return CapturedStep(self._segments, self._between, self._counted, logits)

    def _end_segment(self) -> None:
        segment = self._graphs.end()
        segment.replay()
        self._segments.append(segment)

    def _keeper(self, layer: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._residuals[layer] = args[0]

        return keep
