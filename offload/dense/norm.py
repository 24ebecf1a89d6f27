"""Root mean square norms of few tokens in one call of the library, where a model has its own in seven."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import DTYPES, check, library

FEW_TOKENS = 16
"""For more, torch's threads are worth their while."""


def use_native_norms(model: nn.Module) -> None:
    """Let the norms of `model`, in CPU memory, that are recognized as such run in the library."""
    if library() is None:
        return
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            epsilon = epsilon_of(module)
            if epsilon is not None and _is_served(module) and agrees(module, epsilon, native_norm):
                cls: Any = type(module)
                module._native_epsilon = epsilon  # type: ignore[assignment]
                module.__class__ = _native(cls)


def native_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight [D] * x [..., D] / sqrt(mean of x^2 + epsilon), rounded where transformers round it.

    Both in CPU memory, of one dtype of the library's; the result is a new tensor.
    """
    lib = library()
    assert lib is not None
    x = x.contiguous()
    y = torch.empty_like(x)
    width = weight.shape[0]
    dtype = DTYPES[x.dtype]
    check(
        lib.moe_norm(x.data_ptr(), weight.data_ptr(), epsilon, x.numel() // width, width, dtype, y.data_ptr())
    )
    return y


@cache
def _native(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x, weight = hidden_states, self.weight
        if (
            args
            or kwargs
            or x.dtype is not weight.dtype
            or x.shape[-1:] != weight.shape
            or x.numel() > FEW_TOKENS * weight.shape[0]
            or not (x.is_cpu and weight.is_cpu and weight.is_contiguous())
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            other: torch.Tensor = cls.forward(self, hidden_states, *args, **kwargs)
            return other
        return native_norm(x, weight, self._native_epsilon)

    return stand_in(cls, _native, forward)


def _is_served(module: nn.Module) -> bool:
    """Whether the library can read its weight."""
    weight = module.weight
    return isinstance(weight, torch.Tensor) and weight.device.type == "cpu" and weight.is_contiguous()


def epsilon_of(module: nn.Module) -> float | None:
    """What a norm adds to the mean of squares, by any of the names that it has; None for a norm without
    weights of its own."""
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def agrees(
    module: nn.Module, epsilon: float, norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
) -> bool:
    """Whether a module, on vectors from tiny to huge, gives what `norm`, called as `native_norm`, does, but
    for the order of a sum. The module is one that `epsilon_of` answers for."""
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype not in DTYPES:
        return False
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([1e-4, 1e-2, 1.0, 1e2], dtype=torch.float32).repeat(FEW_TOKENS // 4)
    x = torch.randn(FEW_TOKENS, weight.shape[0], generator=generator, dtype=torch.float32) * sizes[:, None]
    x[FEW_TOKENS // 2 :, 0] *= 100  # stands out, as in language models
    x = x.to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            wanted = module(x)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        if not isinstance(wanted, torch.Tensor) or wanted.shape != x.shape or wanted.dtype is not x.dtype:
            return False
        got = norm(x, weight, epsilon)
    # Of 16 bits, one number is rounded twice; of 32, sums in another order are off by more than a step.
    info = torch.finfo(x.dtype)
    step = info.eps * (16 if x.dtype is torch.float32 else 2)
    smallest = info.smallest_normal * info.eps * (1 + weight.detach().float().abs())
    return bool(((got.float() - wanted.float()).abs() <= step * wanted.float().abs() + smallest).all())
