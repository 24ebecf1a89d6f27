"""What kernels are given and what they promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moe_local.offload.quantize.layout import Layout

Linear = Callable[[torch.Tensor, str], torch.Tensor]
"""x [T, in], name of the matrix -> [T, out], the bias added."""


class ExpertMath(Protocol):
    """What an architecture's experts do between their matrices; an OffloadedExperts has it all."""

    has_gate: bool
    has_bias: bool

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, 2F] (gate and up as the architecture lays them out) or [T, F] -> [T, F]."""

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D], what follows the down projection."""


class Readable(Protocol):
    """An expert whose bytes may be read now; a Lease is one."""

    @property
    def expert(self) -> int: ...
    @property
    def buffer(self) -> torch.Tensor: ...
    @property
    def layout(self) -> Layout: ...


class LayerStep(Protocol):
    """One forward of a layer's experts on tokens x [T, D].

    The result does not depend on how the experts are grouped nor on the groups' order: each answer goes to
    its own place in [T * K, D], and the sum over K runs in the router's order.
    """

    def compute(self, group: Sequence[Readable]) -> None:
        """Compute experts that the routing names, each once. Their buffers are read until this returns, or
        on a device until its current stream has got past it."""

    def result(self) -> torch.Tensor:
        """The weighted sum, [T, D] in the dtype of x, after every expert has been computed."""
