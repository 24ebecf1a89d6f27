"""Gated feed-forward parts that all tokens pass, such as shared experts, for few tokens in one call."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch

from moe_local.offload.dense.library_call import LibraryCall, matrix_of, same_format
from moe_local.offload.dense.token_calls import agrees_on_sizes, all_close, attempt, token_calls
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.kernels.gates import CONCATENATED, recognize
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import DTYPES, Matrix, Mlp, check, library, loaded_library
from moe_local.offload.system.threads import kernel_threads

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATION = "act_fn"
"""The attributes that such a module has; an activation is a child of its own, or a function."""


class _Shape(NamedTuple):
    """As Mlp in moe_native.h."""

    function: int


class _Gated(NamedTuple):
    """The module's step between its matrices, as `recognize` takes it."""

    activation: Any
    has_gate: bool = True

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        output: torch.Tensor = self.activation(gate) * up
        return output

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        return output


class TokenMlp(LibraryCall):
    """The library's call for one module."""

    FIRST = ("gate_proj",)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D], which it `takes` -> [..., D]. To be called only after `ready`."""
        return run(self.struct, None, x, self.activations)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x [..., D] are few tokens, in the dtype and memory layout that the library reads."""
        fits = x.dtype in DTYPES and x.shape[-1] == self._hidden and x.is_cpu and x.is_contiguous()
        return fits and 0 < x.numel() <= self.most_tokens * self._hidden

    def read(self, module: Any, dtype: torch.dtype) -> Mlp:
        matrices = (matrix_of(getattr(module, name)) for name in PROJECTIONS)
        return Mlp(*matrices, self.shape.function, DTYPES[dtype])

    @staticmethod
    def shape_of(module: Any, dtype: torch.dtype) -> _Shape | None:
        if {name for name, _ in module.named_children()} - {ACTIVATION} != {*PROJECTIONS}:
            return None
        if any(True for _ in module.parameters(recurse=False)) or not callable(
            getattr(module, ACTIVATION, None)
        ):
            return None
        gate, up, down = linears = [getattr(module, name) for name in PROJECTIONS]
        if not all(hasattr(linear, "in_features") for linear in linears):
            return None
        if not same_format([gate, up], dtype) or not same_format([down], dtype):
            return None
        if getattr(gate, "activations", "native") != getattr(down, "activations", "native"):
            return None  # one is quantized, for which alone activations are rounded
        widths = [(linear.in_features, linear.out_features) for linear in (up, down)]
        if widths != [(gate.in_features, gate.out_features), (gate.out_features, gate.in_features)]:
            return None
        function = _function(getattr(module, ACTIVATION))
        return None if function is None else _Shape(function)

    def watched(self, module: Any) -> list[Any]:
        return [*super().watched(module), (module, ACTIVATION)]


def run(mlp: Mlp, share: Matrix | None, x: torch.Tensor, activations: str) -> torch.Tensor:
    """x [..., D] -> [..., D]; see moe_mlp in moe_native.h. `activations` as in QuantizedLinear."""
    y = torch.empty_like(x)
    check(
        loaded_library().moe_mlp(
            ctypes.byref(mlp),
            None if share is None else ctypes.byref(share),
            x.data_ptr(),
            x.numel() // x.shape[-1],
            y.data_ptr(),
            rounding(activations, x.dtype),
            kernel_threads(),
        )
    )
    return y


def use_token_mlps(model: Any) -> None:
    """Let the library compute, for few tokens, those gated feed-forward parts of `model`, in CPU memory, that
    it is able to. Trials decide which these are.

    Runs a forward of one token, for which experts must return something.
    """
    if library() is None or model.device.type != "cpu":
        return
    found = [module for module in model.modules() if hasattr(module, PROJECTIONS[0])]
    for called, call in (token_calls(model, found) if found else {}).items():
        module: Any = called
        if len(call.args) != 1 or call.kwargs or not torch.is_tensor(call.args[0]):
            continue
        calls = TokenMlp.of(module, call.args[0].dtype)
        if calls is not None and _agrees(module, calls, call.args[0]):
            module._token_mlp = calls
            cls: Any = type(module)
            module.__class__ = _direct(cls)


def _agrees(module: Any, calls: TokenMlp, like: torch.Tensor) -> bool:
    """Whether the library's call and the module give the same for random tokens `like` [..., D]."""
    generator = torch.Generator().manual_seed(23)

    @torch.no_grad()
    def agrees_at(size: float) -> bool:
        x = size * torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)
        if not calls.takes(x) or not calls.ready(module, x.dtype):
            return False
        wanted = attempt(module, x)
        return torch.is_tensor(wanted) and all_close([(calls(x), wanted)], calls.activations)

    return agrees_on_sizes(agrees_at)


def _function(activation: Any) -> int | None:
    """The library's function for a module's activation, or None."""
    math: Any = _Gated(activation)
    gate = recognize(math)
    # Mlp has no limits, which the clamped functions need
    return gate.function if gate is not None and gate.arrangement == CONCATENATED else None


@cache
def _direct(cls: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls: TokenMlp = self._token_mlp
        if (
            len(args) != 1
            or kwargs
            or self.training
            or not calls.takes(args[0])
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not calls.ready(self, args[0].dtype)
        ):
            return cls.forward(self, *args, **kwargs)
        return calls(args[0])

    return stand_in(cls, _direct, forward)
