"""One token's choice of experts in one call of the library, where a model makes six operations of it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_local.offload.kernels.cpu import plain_matrix
from moe_local.offload.native.library import DTYPES, Matrix, check, library

TRIALS = 32
"""Tokens on which a router is compared with ours."""


def use_native_routers(model: nn.Module) -> None:
    """Let the routers of `model`, in CPU memory, that the library can do run in it, one token at a time.

    Such a router has one weight, perhaps a bias, and answers (logits, weights, experts); what it does with
    the logits is found out by trying.
    """
    if library() is None:
        return
    for module in model.modules():
        router = NativeRouter.of(module)
        if router is not None and router.agrees(module):
            cls: Any = type(module)
            module._native_router = router  # type: ignore[assignment]
            module.__class__ = _native(cls)


class NativeRouter:
    """The library's call for one router. It holds the address of its weight, checked anew at each call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int) -> None:
        self.weight, self.bias, self.top_k = weight, bias, top_k
        self.normalized = False
        self._matrix: Matrix | None = None

    @classmethod
    def of(cls, module: nn.Module) -> NativeRouter | None:
        """For a module with a router's parameters and nothing else."""
        weight, bias, top_k = (getattr(module, name, None) for name in ("weight", "bias", "top_k"))
        parameters = {name for name, _ in module.named_parameters()}
        if not isinstance(top_k, int) or not parameters or parameters - {"weight", "bias"}:
            return None
        if (
            any(True for _ in module.children())
            or any(True for _ in module.buffers())
            or weight is None
            or weight.dim() != 2
        ):
            return None
        if weight.dtype not in DTYPES or weight.device.type != "cpu" or not weight.is_contiguous():
            return None
        return cls(weight, bias, top_k) if 1 <= top_k <= weight.shape[0] else None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [1, D] of the weight's dtype -> logits [1, E], too, weights [1, K] fp32, experts [1, K] int64."""
        lib = library()
        assert lib is not None
        address = self.weight.data_ptr()
        if self._matrix is None or self._matrix.q != address:
            self._matrix = plain_matrix(self.weight, self.bias)
        logits = x.new_empty(1, self.weight.shape[0])
        weights = torch.empty(1, self.top_k, dtype=torch.float32)
        experts = torch.empty(1, self.top_k, dtype=torch.int64)
        check(
            lib.moe_route(
                ctypes.byref(self._matrix),
                x.data_ptr(),
                DTYPES[x.dtype],
                self.top_k,
                self.normalized,
                logits.data_ptr(),
                weights.data_ptr(),
                experts.data_ptr(),
            )
        )
        return logits, weights, experts

    def agrees(self, module: nn.Module) -> bool:
        """Whether the module answers the same, with weights that sum to one or not; takes note of which."""
        for normalized in (False, True):
            self.normalized = normalized
            if all(self._agrees_on(module, x) for x in self._tokens()):
                return True
        return False

    def _tokens(self) -> torch.Tensor:
        """[TRIALS, 1, D]: tokens that make some routers sure of themselves and others not."""
        generator = torch.Generator().manual_seed(5)
        weight = self.weight.detach().float()
        x = torch.randn(TRIALS, 1, weight.shape[1], generator=generator, dtype=torch.float32)
        sizes = torch.logspace(-1, 1, TRIALS, dtype=torch.float32)[:, None, None]
        return (x * sizes / weight.square().sum(dim=1).mean().sqrt().clamp_min(1e-6)).to(self.weight.dtype)

    def _agrees_on(self, module: nn.Module, x: torch.Tensor) -> bool:
        with torch.no_grad():
            try:
                wanted = module(x)
            except (RuntimeError, TypeError, ValueError, AttributeError):
                return False
            if not isinstance(wanted, tuple) or len(wanted) != 3 or not all(map(torch.is_tensor, wanted)):
                return False
            got = self(x)
            if any(a.shape != b.shape for a, b in zip(got, wanted, strict=True)):
                return False
            if got[0].dtype is not wanted[0].dtype or got[2].dtype is not wanted[2].dtype:
                return False
            step = 4 * torch.finfo(x.dtype).eps
            logits = (got[0].float() - wanted[0].float()).abs() <= step * (1 + wanted[0].float().abs())
            chosen = wanted[0].float().gather(1, got[2]), wanted[0].float().gather(1, wanted[2])
            same = (chosen[0] - chosen[1]).abs() <= step * (1 + chosen[1].abs())  # equals may change places
            weights = (got[1] - wanted[1].float()).abs() <= max(step, 1e-5) * 8
            return bool(logits.all() and same.all() and weights.all())


@cache
def _native(cls: Any) -> Any:
    """A subclass of a router's class: hooks and `isinstance` find what they look for."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x, weight = hidden_states, self.weight
        if (
            args
            or kwargs
            or x.numel() != weight.shape[1]
            or x.dtype is not weight.dtype
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return cls.forward(self, hidden_states, *args, **kwargs)
        return self._native_router(x.contiguous())

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
