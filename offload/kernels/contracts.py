"""The interfaces of kernels: what they take and what they guarantee."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moe_local.offload.quantize.layout import Layout

Linear = Callable[[torch.Tensor, str], torch.Tensor]
"""(x [T, in], name of a matrix) -> x times that matrix, transposed, plus its bias: [T, out]."""


class ExpertMath(Protocol):
    """What an architecture's experts compute besides matrix products; OffloadedExperts implements it."""

    has_gate: bool
    has_bias: bool

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, 2F] (gate and up as the architecture lays them out) or [T, F] -> [T, F]."""

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D], the operation that follows the down projection."""


class Readable(Protocol):
    """An expert whose bytes may be read now; a Lease is one."""

    @property
    def expert(self) -> int: ...
    @property
    def buffer(self) -> torch.Tensor: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def on_host(self) -> bool:
        """Whether the bytes are in RAM while x is on a device: only a SharedStep takes these."""


class LayerStep(Protocol):
    """One forward of a layer's experts on tokens x [T, D].

    The result does not depend on how the experts are grouped or on the order of groups: each expert's answer
    (its output for one token) goes to its own place in [T * K, D], and the sum over K runs in the router's
    order.
    """

    def compute(self, group: Sequence[Readable]) -> None:
        """Compute experts that the routing names, each once. Their buffers are read until this returns or, on
        a device, until the work that it puts on the current stream has run."""

    def accept(self, places: torch.Tensor, answers: torch.Tensor) -> None:
        """Take answers [n, D] fp32 of experts that were computed elsewhere, for these places, int64 [n].

        Both are on the device of x and are read until this returns or, on a device, until the work that it
        puts on the current stream has run.
        """

    def result(self) -> torch.Tensor:
        """The weighted sum, [T, D] in the dtype of x, after every expert has been computed."""


Rest = Callable[[torch.Tensor], LayerStep]
"""outputs, float32 [T * K, D] -> a step that writes experts' answers to it."""


class Answers(Protocol):
    """Computes experts of one forward of a layer on the CPU, without summing them up."""

    def compute(self, group: Sequence[Readable], out: torch.Tensor) -> torch.Tensor:
        """Compute experts whose bytes are in RAM into `out`, fp32 [n, D], n being their tokens in all.

        Returns the places, int64 [n] on the CPU, where the rows of `out` belong. Blocks until it is done.
        """
