"""Few tokens' choice of experts in one call of the library, where a model needs six operations."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_local.offload.kernels.cpu import plain_matrix
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import DTYPES, Matrix, check, library

FEW_TOKENS = 16
"""For more tokens torch's threads are faster."""

TRIALS = 32
"""Tokens on which a model's router is compared with the library's."""


def use_native_routers(model: nn.Module) -> None:
    """Let the library compute those routers of `model`, in CPU memory, that it is able to, for few tokens.

    Such a router has one weight, perhaps a bias, and returns (logits, weights, experts); how it gets weights
    from logits is found out by trial.
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
    """The library's call for one router. Holds the address of its weight, checked before each call."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.normalized = False
        self.dtype = torch.float32
        """The dtype of the weights that the module returns."""
        self._where: tuple[Any, ...] | None = None
        self._matrix: Matrix | None = None

    @classmethod
    def of(cls, module: nn.Module) -> NativeRouter | None:
        """The call for a module that has a router's parameters and nothing else; None for other modules."""
        weight, top_k = (getattr(module, name, None) for name in ("weight", "top_k"))
        parameters = {name for name, _ in module.named_parameters()}
        if not isinstance(top_k, int) or not parameters or parameters - {"weight", "bias"}:
            return None
        if any(True for _ in module.children()) or any(True for _ in module.buffers()):
            return None
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.dtype not in DTYPES:
            return None
        router = cls(top_k) if 1 <= top_k <= weight.shape[0] else None
        return router if router is not None and router.ready(module) else None

    @property
    def matrix(self) -> Matrix:
        """The library's descriptor of the weight. Valid after `ready`; a new one if the weight has moved."""
        assert self._matrix is not None
        return self._matrix

    def ready(self, module: Any) -> bool:
        """Update the addresses of the module's weight and bias.

        False if the library cannot read them, or if the module's top_k has changed.
        """
        weight, bias = module.weight, getattr(module, "bias", None)
        where = weight.data_ptr(), weight.dtype, None if bias is None else bias.data_ptr()
        if where != self._where:
            if not _is_readable(weight) or (
                bias is not None and (bias.shape != weight.shape[:1] or not _is_readable(bias))
            ):
                return False
            self._where, self._matrix = where, plain_matrix(weight, bias)
        return bool(module.top_k == self.top_k)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, D] of the weight's dtype -> logits [T, E] of the same, weights [T, K], experts [T, K] int64;
        a token's are those that it has alone.

        To be called only after `ready`.
        """
        lib = library()
        assert lib is not None
        assert self._matrix is not None
        tokens = x.shape[0]
        logits = x.new_empty(tokens, self._matrix.rows)
        weights = torch.empty(tokens, self.top_k, dtype=torch.float32)
        experts = torch.empty(tokens, self.top_k, dtype=torch.int64)
        check(
            lib.moe_route(
                ctypes.byref(self._matrix),
                x.data_ptr(),
                tokens,
                DTYPES[x.dtype],
                self.top_k,
                self.normalized,
                logits.data_ptr(),
                weights.data_ptr(),
                experts.data_ptr(),
            )
        )
        return logits, weights if self.dtype is torch.float32 else weights.to(self.dtype), experts

    def agrees(self, module: nn.Module) -> bool:
        """Whether the module gives the same; sets `normalized`: whether weights are scaled to sum to one.

        The module is called with a single token, as it will be in use, and with all tokens in a single call.
        """
        tokens = self._tokens(module)
        for normalized in (False, True):
            self.normalized = normalized
            if self._agrees_on(module, tokens[:1]) and self._agrees_on(module, tokens):
                return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy."""
        return {**self.__dict__, "_where": None, "_matrix": None}

    def _tokens(self, module: nn.Module) -> torch.Tensor:
        """[TRIALS, D]: random tokens, some with nearly equal and some with very different scores."""
        generator = torch.Generator().manual_seed(5)
        given: Any = module.weight
        weight: torch.Tensor = given.detach().float()
        x = torch.randn(TRIALS, weight.shape[1], generator=generator, dtype=torch.float32)
        sizes = torch.logspace(-1, 1, TRIALS, dtype=torch.float32)[:, None]
        return (x * sizes / weight.square().sum(dim=1).mean().sqrt().clamp_min(1e-6)).to(given.dtype)

    def _agrees_on(self, module: nn.Module, x: torch.Tensor) -> bool:
        """Whether the module and the library agree on each of the tokens x [T, D]."""
        with torch.no_grad():
            try:
                wanted = module(x)
            except (RuntimeError, TypeError, ValueError, AttributeError):
                return False
            if not isinstance(wanted, tuple) or len(wanted) != 3 or not all(map(torch.is_tensor, wanted)):
                return False
            self.dtype = wanted[1].dtype
            got = tuple(map(torch.cat, zip(*map(self, x.split(1)), strict=True)))
            if any(a.shape != b.shape for a, b in zip(got, wanted, strict=True)):
                return False
            if got[0].dtype is not wanted[0].dtype or got[2].dtype is not wanted[2].dtype:
                return False
            theirs = wanted[0].float()
            steps = 32 if x.dtype is torch.float32 else 4  # sums of thousands, or one rounding of them
            allowed = steps * torch.finfo(x.dtype).eps * (1 + theirs.abs().amax(-1, keepdim=True))
            logits = (got[0].float() - theirs).abs() <= allowed
            # experts with equal logits may swap places
            same = (theirs.gather(1, got[2]) - theirs.gather(1, wanted[2])).abs() <= allowed
            # Compare with weights computed from the module's logits: weights computed from the library's
            # logits would be less close where logits are rounded to 16 bits.
            weights = theirs.softmax(-1).gather(1, wanted[2])
            if self.normalized:
                weights = weights / weights.sum(-1, keepdim=True)
            off = (weights - wanted[1].float()).abs()
            exact = off <= 1e-6 + 2 * torch.finfo(self.dtype).eps * weights
            return bool(logits.all() and same.all() and exact.all())


def _is_readable(weight: torch.Tensor) -> bool:
    return weight.dtype in DTYPES and weight.is_cpu and weight.is_contiguous()


@cache
def _native(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x, weight = hidden_states, self.weight
        if (
            args
            or kwargs
            or x.shape[-1] != weight.shape[1]
            or not 0 < x.numel() <= FEW_TOKENS * weight.shape[1]
            or (x.dim() != 2 and x.numel() > weight.shape[1])
            or x.dtype is not weight.dtype
            or not x.is_cpu
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not self._native_router.ready(self)
        ):
            return cls.forward(self, hidden_states, *args, **kwargs)
        return self._native_router(x.reshape(-1, x.shape[-1]).contiguous())

    return stand_in(cls, _native, forward)
