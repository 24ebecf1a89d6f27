"""What experts compute besides matrix products, and experts to be read: what kernels under test are given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from moe_local.offload.quantize.layout import Layout


class Math:
    """silu(gate) * up, or relu without a gate: an ExpertMath."""

    def __init__(self, *, has_gate: bool = True, has_bias: bool = False) -> None:
        self.has_gate, self.has_bias = has_gate, has_bias

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.has_gate:
            return F.relu(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        return output


class GptOss(Math):
    """Gate and up alternate, and are clamped."""

    alpha, limit = 1.702, 7.0

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden[..., ::2].clamp(max=self.limit), hidden[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


class Lease(NamedTuple):
    """An expert that may be read: a Readable."""

    expert: int
    buffer: torch.Tensor
    layout: Layout
    on_host: bool = False
