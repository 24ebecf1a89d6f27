"""The routed experts of one layer in one forward, computed group by group as they become readable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_local.offload.kernels.contracts import Answers, ExpertMath, LayerStep, Readable
from moe_local.offload.kernels.cpu import CpuExperts
from moe_local.offload.kernels.cpu_table import CpuTable
from moe_local.offload.kernels.expert import ExpertKernels
from moe_local.offload.kernels.fallback import Fallback
from moe_local.offload.kernels.grouped import GroupedExperts
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.tiers.small_pins import sent


class LayerKernels:
    """Starts LayerSteps for the slots of one store, with the fastest kernels for each layer and input."""

    def __init__(self, activations: str = "native") -> None:
        """`activations`: "native", or "int8" to round them to eight bits if the kernel can."""
        self._activations = activations
        self._each = ExpertKernels(activations)
        self._together = CpuExperts(activations)
        self.grouped = GroupedExperts()
        self._fallback = Fallback()
        self._leads: dict[tuple[ExpertMath, torch.device, torch.dtype, bool], Layout] = {}

    def begin(
        self,
        math: ExpertMath,
        x: torch.Tensor,
        routing: Routing,
        weights: torch.Tensor,
        layout: Layout,
    ) -> LayerStep:
        """A step for x [T, D] with the routing's `weights` [T, K]. `layout` is that of the experts, or the
        `lead` of several."""

        def rest(outputs: torch.Tensor) -> LayerStep:
            return OneByOne(self._each, math, x, routing, weights, outputs)

        if self._together.serves(math, x, layout):
            return self._together.begin(math, x, routing, weights, layout, rest)
        if self.grouped.serves(math, x, routing, layout):
            return self.grouped.begin(math, x, routing, weights, layout, rest)
        self._fallback.tell(math, x, layout, self.grouped)
        return OneByOne(self._each, math, x, routing, weights)

    def table(
        self,
        math: ExpertMath,
        x: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        layout: Layout,
        counts: torch.Tensor,
    ) -> CpuTable | None:
        """A CpuTable for tokens like x [1, D] and experts in CPU memory, or None if the library does not
        serve them."""
        if not self._together.serves(math, x, layout):
            return None
        experts = [self._together.expert(buffer, layout, math) for buffer in buffers]
        return CpuTable(experts, self._together.gate(math), self._activations, counts)

    def lead(self, math: ExpertMath, x: torch.Tensor, layouts: Sequence[Layout]) -> Layout:
        """One of the layouts of a layer's experts: one that the fastest kernels serve, if there is one.

        The answer is cached by `math`, since a layer always has the same layouts.
        """
        if len(layouts) == 1:
            return layouts[0]
        key = (math, x.device, x.dtype, torch.is_autocast_enabled(x.device.type))
        lead = self._leads.get(key)
        if lead is None:
            for layout in layouts:  # `begin` would warn about the lead only
                self._fallback.tell(math, x, layout, self.grouped)
            served = (layout for layout in layouts if self._has_kernels(math, x, layout))
            lead = self._leads[key] = next(served, layouts[0])
        return lead

    def _has_kernels(self, math: ExpertMath, x: torch.Tensor, layout: Layout) -> bool:
        if x.is_cuda:
            return self.grouped.launcher(math, x.device, layout) is not None
        return self._together.serves(math, x, layout)

    def answers(self, math: ExpertMath, x: torch.Tensor, routing: Routing, layout: Layout) -> Answers:
        """An Answers for x [T, D] on the CPU, with the fastest kernels that serve it."""
        rest = AnswersOneByOne(self._each, math, x, routing)
        if self._together.serves(math, x, layout):
            return self._together.answers(math, x, routing, layout, rest)
        return rest


class AnswersOneByOne:
    """An Answers that computes one expert after the other."""

    def __init__(self, kernels: ExpertKernels, math: ExpertMath, x: torch.Tensor, routing: Routing) -> None:
        self._kernels = kernels
        self._math = math
        self._x = x
        self._routing = routing

    def compute(self, group: Sequence[Readable], out: torch.Tensor) -> torch.Tensor:
        starts, places = self._routing.places_of(readable.expert for readable in group)
        rows = places.div(self._routing.top_k, rounding_mode="floor")
        for readable, start, end in zip(group, starts, starts[1:], strict=False):
            x = self._x.index_select(0, rows[start:end])
            out[start:end] = self._kernels.forward(self._math, x, readable.buffer, readable.layout)
        return places


class OneByOne:
    """A LayerStep that computes one expert after the other, and gathers and scatters tokens with torch."""

    def __init__(
        self,
        kernels: ExpertKernels,
        math: ExpertMath,
        x: torch.Tensor,
        routing: Routing,
        weights: torch.Tensor,
        outputs: torch.Tensor | None = None,
    ) -> None:
        """Answers go to `outputs` [T * K, D], or to new memory if it is None."""
        self._kernels = kernels
        self._math = math
        self._x = x
        self._routing = routing
        self._weights = weights
        self._outputs = x.new_empty(len(routing.ids), x.shape[1]) if outputs is None else outputs
        if routing.tokens > 1:  # all at once, rather than a copy for every expert
            self._places = sent(routing.sorted_places, x.device)
            self._rows = self._places.div(routing.top_k, rounding_mode="floor")

    def compute(self, group: Sequence[Readable]) -> None:
        for readable in group:
            if self._routing.tokens == 1:
                y = self._kernels.forward(self._math, self._x, readable.buffer, readable.layout)
                self._outputs[self._routing.ids.index(readable.expert)] = y[0]
            else:
                mine = self._routing.span(readable.expert)
                x = self._x.index_select(0, self._rows[mine])
                y = self._kernels.forward(self._math, x, readable.buffer, readable.layout)
                y = y.to(self._outputs.dtype)  # autocast may change the dtype
                self._outputs.index_copy_(0, self._places[mine], y)

    def accept(self, places: torch.Tensor, answers: torch.Tensor) -> None:
        self._outputs.index_copy_(0, places, answers.to(self._outputs.dtype))

    def result(self) -> torch.Tensor:
        outputs = self._outputs.view(*self._weights.shape, -1)
        return (outputs * self._weights.unsqueeze(-1)).sum(dim=1).to(self._x.dtype)
