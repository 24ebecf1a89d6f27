"""One expert's feed-forward on some tokens, straight from its flat buffer.

`expert_forward` is the one function that the rest of the house calls. It takes the fused path where there
is one for the device and format, and `kernels.reference` otherwise, which all paths are tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from moe_local.offload.kernels.reference import reference_linear
from moe_local.offload.quantize.codec import codec_for
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


def expert_forward(math: ExpertMath, x: torch.Tensor, buffer: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One expert on tokens x [T, D] -> [T, D], in the dtype and on the device of x.

    `buffer` is the expert's slot, uint8 on the device of x, read in place while this runs.
    """
    linear = _linear(x, buffer, layout, math.has_bias)
    hidden = math.activate(linear(x, "gate_up_proj" if math.has_gate else "up_proj"))
    return math.finish(linear(hidden, "down_proj"))


def _linear(x: torch.Tensor, buffer: torch.Tensor, layout: Layout, has_bias: bool) -> Linear:
    if layout.format == "nf4" and x.is_cuda:
        from moe_local.offload.kernels.bnb import nf4_linear

        return nf4_linear(buffer, layout, x.dtype, has_bias)
    return reference_linear(codec_for(layout.format).decode(buffer, layout, x.dtype), has_bias)
