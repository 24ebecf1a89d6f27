"""Captures a forward of one token in segments, between which a layer's experts run without a graph."""

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
"""Called with a layer and the residual that is the input of the norm before its router: Prefetcher.saw."""


class Between(Protocol):
    """Work between two segments, which reads and writes tensors at fixed addresses."""

    def run(self) -> None:
        """Do the work, ordered after all work that the devices were given before."""


class Pause:
    """The experts of one layer, on tensors at fixed addresses.

    Holds references to the tensors that the previous segment leaves for it: otherwise the graphs' pool would
    give their memory to a later segment.
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
        """[1, D], which the next segment reads."""

    def run(self) -> None:
        if self._residual is not None and self._saw is not None:
            self._saw(self._module.index, self._residual)  # hooks do not run in a replay
        self.output.copy_(self._module.answer(*self._arguments))


class Crossing:
    """A copy of tensors to another card. Holds both sources and targets, for the same reason as a Pause."""

    def __init__(self, tensors: Sequence[torch.Tensor], card: torch.device) -> None:
        self._tensors = list(tensors)
        self.outputs = [torch.empty_like(tensor, device=card) for tensor in tensors]
        """The tensors' copies on the card, as of the last `run`."""

    def run(self) -> None:
        for tensor, output in zip(self._tensors, self.outputs, strict=True):
            output.copy_(tensor)  # between cards, torch synchronizes both current streams


class CapturedStep:
    """A captured forward, which can be replayed after the contents of its input tensors have changed."""

    def __init__(
        self,
        segments: Sequence[Graph],
        between: Sequence[Between],
        counted: Sequence[OffloadedExperts],
        logits: torch.Tensor,
    ) -> None:
        """`counted`: modules whose experts were captured as well, and which are told of every replay."""
        self._parts = list(zip_longest(segments, between))
        self._counted = tuple(counted)
        self.segments = len(segments)
        self.logits = logits
        """[1, vocabulary] fp32, as of the last replay."""

    @property
    def is_valid(self) -> bool:
        """Whether all captured experts are still at the captured addresses."""
        return all(module.stays_captured for module in self._counted)

    def replay(self) -> None:
        """Replay the forward; only while it `is_valid`. Raises what the experts of a layer raise, after which
        a later replay starts from the beginning."""
        for segment, between in self._parts:
            segment.replay()
            if between is not None:
                between.run()
        for module in self._counted:
            module.count_replay()


class Recording:
    """The capture of one forward. Each segment is replayed once complete, so its results are real.

    While it is `attached`, it is the `seam` of the modules that hold experts, which call it to run them. So
    do the CardMoves of a model on several cards, each of which has its own segments.
    """

    def __init__(
        self, graphs: Graphs, hf: Any, sites: Sequence[RouterSite | None] = (), saw: Saw | None = None
    ) -> None:
        """`sites`: the routers by layer; `saw` is called with the inputs of their norms."""
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
        """Whether a layer's experts are running: an error then comes from them, not from the capture."""

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
        """Run a layer's experts: captured with the rest where that is possible, else between two segments."""
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
        """Copy tensors to `card`, as a Mover does, between two segments; the second one is captured there."""
        self._end_segment()
        crossing = Crossing(tensors, card)
        crossing.run()
        self._between.append(crossing)
        self._graphs.begin(card)
        return crossing.outputs

    def finish(self, logits: torch.Tensor) -> CapturedStep:
        """End the capture of a forward whose result is `logits`."""
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
