"""Root mean square norms on a GPU in one kernel of torch's, where models of transformers launch seven.

A token's norms are two kernels in five of those that it launches (docs/log.md), and what each takes, a
microsecond or two even in a CUDA graph, is what small models' tokens are made of.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_local.offload.dense.norm import agrees, epsilon_of
from moe_local.offload.modeling.stand_in import stand_in


def use_fused_norms(model: nn.Module) -> None:
    """Let the norms of `model` that are recognized as such, wherever it lies, be computed by torch's.

    In 16 bits these round once, as gpt-oss' own do, where most models' round twice.
    """
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):  # which hooks have replaced
            continue
        epsilon = epsilon_of(module)
        if epsilon is not None and agrees(module, epsilon, fused_norm):
            cls: Any = type(module)
            module._fused_epsilon = epsilon  # type: ignore[assignment]
            module.__class__ = _fused(cls)


def fused_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight [D] * x [..., D] / sqrt(mean of x^2 + epsilon), both of one dtype; in fp32 until the end."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


@cache
def _fused(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x, weight = hidden_states, self.weight
        if (
            args
            or kwargs
            or x.dtype is not weight.dtype
            or x.shape[-1:] != weight.shape
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
        ):
            other: torch.Tensor = cls.forward(self, hidden_states, *args, **kwargs)
            return other
        return fused_norm(x, weight, self._fused_epsilon)

    return stand_in(cls, _fused, forward)
