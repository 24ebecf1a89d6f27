"""Root mean square norms that are gated (Gated DeltaNet, Mamba-2), in one call of the library."""

from __future__ import annotations

from collections.abc import Callable
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
        if "RMSNormGated" not in type(module).__name__ or "forward" in vars(module) or not _is_read(module):
            continue
        cls: Any = type(module)
        if _opens_last(module):
            module.__class__ = _native(cls)
        elif _opens_first(module):
            module.__class__ = _native_by_groups(cls)


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


def open_and_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float, group: int
) -> torch.Tensor:
    """The norm of x * gate * sigmoid(gate), x and gate [..., D], with weight [D], of each `group` numbers of
    a token by themselves, rounded at the same points as in transformers' Mamba-2.

    All are in CPU memory, and of one dtype that the library supports; x may be fp32 instead. The result is a
    new tensor of x's dtype.
    """
    x, gate = x.contiguous(), gate.contiguous()
    y = torch.empty_like(x)
    width = weight.shape[0]
    pointers = x.data_ptr(), gate.data_ptr(), weight.data_ptr()
    shape = x.numel() // width, width // group, width
    rest = DTYPES[weight.dtype], DTYPES[x.dtype], y.data_ptr(), kernel_threads()
    check(loaded_library().moe_open_and_norm(*pointers, epsilon, *shape, *rest))
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


@cache
def _native_by_groups(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, gate: Any = None, *args: Any, **kwargs: Any) -> Any:
        x, weight, epsilon, group = hidden_states, self.weight, epsilon_of(self), _group_of(self)
        if (
            args
            or kwargs
            or epsilon is None
            or group is None
            or not (isinstance(gate, torch.Tensor) and gate.shape == x.shape and fits(gate, weight))
            or x.dtype not in (weight.dtype, torch.float32)
            or not (x.is_cpu and gate.is_cpu and weight.is_cpu and weight.is_contiguous())
        ):
            return cls.forward(self, hidden_states, gate, *args, **kwargs)
        return open_and_norm(x, gate, weight, epsilon, group)

    return stand_in(cls, _native_by_groups, forward)


def _group_of(module: Any) -> int | None:
    """How many numbers such a norm divides by their own root mean square; None if it does not say, or others
    would be left."""
    group = getattr(module, "group_size", None)
    return group if isinstance(group, int) and group > 0 and len(module.weight) % group == 0 else None


def _is_read(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype not in DTYPES:
        return False
    return epsilon_of(module) is not None and is_served(module)


def _opens_last(module: Any) -> bool:
    """Whether it is the norm that `gated_norm` computes."""
    return _agrees(module, trial_input(module.weight), gated_norm)


def _opens_first(module: Any) -> bool:
    """Whether it is the norm that `open_and_norm` computes, also of the fp32 that scans of prompts return."""
    group = _group_of(module)
    if group is None:
        return False
    x = trial_input(module.weight)
    return all(_agrees(module, x.to(dtype), open_and_norm, group) for dtype in {x.dtype, torch.float32})


def _agrees(module: Any, x: torch.Tensor, norm: Callable[..., torch.Tensor], *rest: Any) -> bool:
    """Whether the module and `norm`, which takes `rest`, too, agree on x."""
    weight = module.weight
    gate = x.flip(0).to(weight.dtype)  # gates of all sizes, too
    wanted = attempt(module, x, gate)
    with torch.no_grad():
        got = norm(x, gate, weight, epsilon_of(module), *rest)
        return same_norms(got, wanted, weight) and _rounds_alike(got, wanted)


def _rounds_alike(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether most numbers of 16 bits are the very same: others' products may stay in fp32 to the end, which
    keeps within the steps that are allowed here, but has a smaller error."""
    return got.dtype is torch.float32 or float((got == wanted).float().mean()) > 0.9
