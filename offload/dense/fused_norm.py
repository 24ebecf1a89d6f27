"""Root mean square norms on a GPU in one to three kernels, where models of transformers launch seven.

A token's norms are two kernels in five of those that it launches (docs/log.md), and what each takes, a
microsecond or two even in a CUDA graph, is what small models' tokens are made of.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_local.offload.dense.norm import Kind, fits, replace_norms
from moe_local.offload.modeling.stand_in import stand_in


def use_fused_norms(model: nn.Module) -> None:
    """Let the norms of `model` that are recognized as such, wherever it lies, be computed by torch's.

    In 16 bits all round once: those with 1 + weight as models' own do, those with a weight as gpt-oss' own,
    where most models' round twice.
    """
    replace_norms(model.modules(), fused_norm, _fused)


def fused_norm(x: torch.Tensor, weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """x [..., D] by a norm with this weight [D], both of one dtype.

    With 1 + weight the quotients are kept in fp32, and torch adds their product with the weight to them in
    fp32, so that neither they nor the factor are rounded to 16 bits, and reads and writes 16 bits itself.
    """
    if not kind.shifted:
        return F.rms_norm(x, weight.shape, weight, kind.epsilon)
    quotient = F.rms_norm(x.float(), weight.shape, None, kind.epsilon)
    return torch.addcmul(quotient, quotient, weight, out=torch.empty_like(quotient, dtype=x.dtype))


@cache
def _fused(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x, weight = hidden_states, self.weight
        if args or kwargs or not fits(x, weight):
            other: torch.Tensor = cls.forward(self, hidden_states, *args, **kwargs)
            return other
        return fused_norm(x, weight, self._norm_kind)

    return stand_in(cls, _fused, forward)
