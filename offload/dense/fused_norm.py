"""Root mean square norms on a GPU in one or two kernels of torch, where models of transformers launch seven.

A token's norms are two kernels in five of those that it launches (docs/log.md), and what each takes, a
microsecond or two even in a CUDA graph, is what small models' tokens are made of.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_local.offload.dense.norm import Kind, fits, kind_of
from moe_local.offload.modeling.stand_in import stand_in


def use_fused_norms(model: nn.Module) -> None:
    """Let the norms of `model` that are recognized as such, wherever it lies, be computed by torch's.

    In 16 bits those with a weight round once, as gpt-oss' own do, where most models' round twice; those with
    1 + weight round twice, where models' own round once.
    """
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):  # which hooks have replaced
            continue
        kind = kind_of(module, fused_norm)
        if kind is not None:
            cls: Any = type(module)
            module._fused_kind = kind  # type: ignore[assignment]
            module.__class__ = _fused(cls)


def fused_norm(x: torch.Tensor, weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """x [..., D] by a norm with this weight [D], both of one dtype.

    1 + weight is never rounded to it: torch adds the quotient's product to the quotient in fp32.
    """
    if not kind.shifted:
        return F.rms_norm(x, weight.shape, weight, kind.epsilon)
    quotient = F.rms_norm(x, weight.shape, None, kind.epsilon)
    return torch.addcmul(quotient, quotient, weight)


@cache
def _fused(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x, weight = hidden_states, self.weight
        if args or kwargs or not fits(x, weight):
            other: torch.Tensor = cls.forward(self, hidden_states, *args, **kwargs)
            return other
        return fused_norm(x, weight, self._fused_kind)

    return stand_in(cls, _fused, forward)
