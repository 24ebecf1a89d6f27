"""Root mean square norms that are gated (Gated DeltaNet), in one call of the library."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from moe_local.offload.dense.norm import epsilon_of, fits, is_served, same_norms, trial_input
from moe_local.offload.dense.token_calls import attempt
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import DTYPES, check, library, loaded_library
from moe_local.offload.system.threads import kernel_threads


def use_native_gated_norms(model: nn.Module) -> None:
    """Let the library compute those gated norms of `model`, in CPU memory, that trials recognize as such."""
    if library() is None:
        return
    for module in model.modules():
        if "RMSNormGated" in type(module).__name__ and "forward" not in vars(module) and _is_taken(module):
            cls: Any = type(module)
            module.__class__ = _native(cls)


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight [D] * (x / sqrt(mean of x^2 + epsilon)) * gate * sigmoid(gate), x and gate [..., D], rounded at
    the same points as in transformers' Qwen3-Next.

    All are in CPU memory and of one dtype that the library supports; the result is a new tensor.
    """
    x, gate = x.contiguous(), gate.contiguous()
    y = torch.empty_like(x)
    width = weight.shape[0]
    rest = x.numel() // width, width, DTYPES[x.dtype], y.data_ptr(), kernel_threads()
    check(loaded_library().moe_gated_norm(x.data_ptr(), gate.data_ptr(), weight.data_ptr(), epsilon, *rest))
    return y


@cache
def _native(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, gate: Any = None, *args: Any, **kwargs: Any) -> Any:
        x, weight, epsilon = hidden_states, self.weight, epsilon_of(self)
        if (
            args
            or kwargs
            or epsilon is None
            or not (isinstance(gate, torch.Tensor) and gate.shape == x.shape and gate.dtype is x.dtype)
            or not fits(x, weight)
            or not (x.is_cpu and gate.is_cpu and weight.is_cpu and weight.is_contiguous())
        ):
            return cls.forward(self, hidden_states, gate, *args, **kwargs)
        return gated_norm(x, gate, weight, epsilon)

    return stand_in(cls, _native, forward)


def _is_taken(module: Any) -> bool:
    weight, epsilon = getattr(module, "weight", None), epsilon_of(module)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype not in DTYPES:
        return False
    if epsilon is None or not is_served(module):
        return False
    x = trial_input(weight)
    gate = x.flip(0)  # gates of all sizes, too
    wanted = attempt(module, x, gate)
    with torch.no_grad():
        got = gated_norm(x, gate, weight, epsilon)
        return same_norms(got, wanted, weight) and _rounds_alike(got, wanted)


def _rounds_alike(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether most numbers of 16 bits are the very same: others' products may stay in fp32 to the end, which
    keeps within the steps that are allowed here, but has a smaller error."""
    return got.dtype is torch.float32 or float((got == wanted).float().mean()) > 0.9
