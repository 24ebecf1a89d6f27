"""Root mean square norms on a GPU in one to three kernels, where transformers' models launch seven.

Two in five of the kernels that a token launches belong to norms (docs/log.md). Each takes a microsecond or
two even in a CUDA graph, and such times make up most of a small model's time per token.
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
    """Let torch's rms_norm compute those norms of `model`, on any device, that are recognized as such.

    In 16 bits the result is rounded once. Models' own norms with a factor of 1 + weight round once, too, and
    so does gpt-oss' norm; other models' norms round twice.
    """
    replace_norms(model.modules(), fused_norm, _fused)


def fused_norm(x: torch.Tensor, weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The norm of x [..., D] with this weight [D], both of one dtype.

    For a factor of 1 + weight, x / rms(x) is kept in fp32, and addcmul adds its product with the weight to it
    in fp32, so that neither the quotient nor the factor is rounded to 16 bits.
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
