"""Root mean square norms in one call of the library, where models need seven operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_local.offload.dense.token_calls import attempt
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import DTYPES, check, library, loaded_library
from moe_local.offload.system.threads import kernel_threads

TRIAL_TOKENS = 16


class Kind(NamedTuple):
    """The variant of a norm, which computes a factor [D] times x [..., D] / sqrt(mean of x^2 + epsilon)."""

    epsilon: float
    shifted: bool
    """Whether the factor is 1 + weight, as in Gemma and Qwen3-Next, instead of the weight."""


Norm = Callable[[torch.Tensor, torch.Tensor, Kind], torch.Tensor]
"""A function with the signature of `native_norm`."""


def use_native_norms(model: nn.Module) -> None:
    """Let the library compute those norms of `model`, in CPU memory, that are recognized as such."""
    if library() is None:
        return
    replace_norms([module for module in model.modules() if is_served(module)], native_norm, _native)


def native_norm(x: torch.Tensor, weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The norm of x [..., D] with this weight [D], rounded at the same points as in transformers.

    Both are in CPU memory and of one dtype that the library supports; the result is a new tensor.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    width = weight.shape[0]
    rest = x.numel() // width, width, DTYPES[x.dtype], y.data_ptr(), kernel_threads()
    check(loaded_library().moe_norm(x.data_ptr(), weight.data_ptr(), kind.shifted, kind.epsilon, *rest))
    return y


@cache
def _native(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x, weight = hidden_states, self.weight
        if (
            args
            or kwargs
            or not fits(x, weight)
            or not (x.is_cpu and weight.is_cpu and weight.is_contiguous())
        ):
            other: torch.Tensor = cls.forward(self, hidden_states, *args, **kwargs)
            return other
        return native_norm(x, weight, self._norm_kind)

    return stand_in(cls, _native, forward)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether another function may compute the norm: x and weight have one width and one dtype that the
    library supports, and neither gradients nor autocast are on."""
    return (
        x.dtype is weight.dtype
        and x.dtype in DTYPES
        and x.shape[-1:] == weight.shape
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    )


def replace_norms(modules: Iterable[nn.Module], norm: Norm, stand_in_for: Callable[[Any], Any]) -> None:
    """Give each module that is found to compute the same as `norm` the class `stand_in_for(its class)`, and
    its Kind as the attribute `_norm_kind`."""
    for module in modules:
        if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):  # which hooks have replaced
            continue
        kind = _kind_of(module, norm)
        if kind is not None:
            module._norm_kind = kind  # type: ignore[assignment]
            module.__class__ = stand_in_for(type(module))


def _kind_of(module: nn.Module, norm: Norm) -> Kind | None:
    """The Kind with which `norm` computes the same as the module, found by trial; None if there is none."""
    weight, epsilon = getattr(module, "weight", None), epsilon_of(module)
    if epsilon is None or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    if weight.dtype not in DTYPES:
        return None
    kinds = (Kind(epsilon, shifted) for shifted in (False, True))
    return next((kind for kind in kinds if _agrees(module, weight, kind, norm)), None)


def is_shifted(module: nn.Module) -> bool:
    """Whether the module is a replaced norm with a factor of 1 + weight."""
    kind = getattr(module, "_norm_kind", None)
    return isinstance(kind, Kind) and kind.shifted


def is_served(module: nn.Module) -> bool:
    """Whether the library can read the module's weight."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.device.type == "cpu" and weight.is_contiguous()


def epsilon_of(module: nn.Module) -> float | None:
    """A norm's epsilon, which models keep under different names; None if there is none."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _agrees(module: nn.Module, weight: torch.Tensor, kind: Kind, norm: Norm) -> bool:
    """Whether a module and `norm` agree on vectors from tiny to huge, up to the order of summation."""
    x = trial_input(weight)
    wanted = attempt(module, x)
    with torch.no_grad():
        return same_norms(norm(x, weight, kind), wanted, weight)


def trial_input(weight: torch.Tensor) -> torch.Tensor:
    """Vectors from tiny to huge, [TRIAL_TOKENS, D] of the dtype of `weight` [D]."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([1e-4, 1e-2, 1.0, 1e2], dtype=torch.float32).repeat(TRIAL_TOKENS // 4)
    x = torch.randn(TRIAL_TOKENS, weight.shape[0], generator=generator, dtype=torch.float32) * sizes[:, None]
    x[TRIAL_TOKENS // 2 :, 0] *= 100  # an outlier, as in language models
    return x.to(weight.device, weight.dtype)


def same_norms(got: torch.Tensor, wanted: Any, weight: torch.Tensor) -> bool:
    """Whether a module's result, `wanted`, is that of a norm with this weight but for the order of sums."""
    if not isinstance(wanted, torch.Tensor) or wanted.shape != got.shape or wanted.dtype is not got.dtype:
        return False
    # In 16 bits one of the two may round twice; in fp32, sums in another order differ by several steps.
    info = torch.finfo(got.dtype)
    step = info.eps * (16 if got.dtype is torch.float32 else 2)
    smallest = info.smallest_normal * info.eps * (1 + weight.detach().float().abs())
    return bool(((got.float() - wanted.float()).abs() <= step * wanted.float().abs() + smallest).all())
