"""What library calls in place of a module's forward have in common: they read its weights where they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import nn

from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.linear import FEW_TOKENS, NativeLinear, QuantizedLinear
from moe_local.offload.kernels.cpu import plain_matrix
from moe_local.offload.native.library import DTYPES, PLAIN, Matrix

MOST_TOKENS = 16
"""Most tokens in a call with quantized weights. Up to the library's `most_in_registers`, which is 4 to 16,
each has the bits that it has alone."""


WATCHED = ("scaling", "variance_epsilon", "eps", "activation")
"""Plain attributes on which what a module computes depends."""


class LibraryCall(ABC):
    """The library's call for one module. It holds the addresses of the module's weights, which are checked
    before each call."""

    FIRST: ClassVar[tuple[str, ...]]
    """Names of a linear layer that takes the module's input; the module has one of them."""

    def __init__(self, module: Any, shape: Any) -> None:
        """`shape`: what `shape_of` gives for the module."""
        first = getattr(module, next(name for name in self.FIRST if hasattr(module, name)))
        self._parts = list(module.named_children())
        self.shape = shape
        self._struct: Any = None
        self._dtype: torch.dtype | None = None
        """The dtype of the inputs that the struct was made for."""
        self._guard: Guard | None = None
        self._hidden: int = first.in_features
        quantized = isinstance(first, QuantizedLinear)
        self.activations = first.activations if quantized else "native"
        self.most_tokens = MOST_TOKENS if quantized else FEW_TOKENS
        """For more tokens, separate calls are faster."""

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype) -> Self | None:
        """The call for a module with the structure that the library expects and inputs of `dtype`; None for
        others. That both compute the same is not checked here."""
        shape = cls.shape_of(module, dtype)
        return None if shape is None else cls(module, shape)

    @staticmethod
    @abstractmethod
    def shape_of(module: Any, dtype: torch.dtype) -> Any:
        """What the library has to know of a module besides the addresses of its weights, for inputs of
        `dtype`; None if it cannot compute it."""

    @abstractmethod
    def read(self, module: Any, dtype: torch.dtype) -> Any:
        """The library's description of the module at its weights' present addresses."""

    @property
    def struct(self) -> Any:
        """The library's description of the module. Valid after `ready`; a new one if weights have moved."""
        return self._struct

    def ready(self, module: Any, dtype: torch.dtype) -> bool:
        """Update the addresses of the module's weights, before a call with inputs of `dtype`.

        False if the module has changed: its parts were replaced or have hooks, or the library cannot read
        their weights.
        """
        if self._guard is not None and dtype is self._dtype and self._guard.holds():
            return True
        if any(module._modules.get(name) is not part for name, part in self._parts):
            return False
        guard = Guard(module, [part for _, part in self._parts], same=self.watched(module))
        if not guard.holds() or self.shape_of(module, dtype) != self.shape:
            return False
        self._struct, self._dtype, self._guard = self.read(module, dtype), dtype, guard
        return True

    def watched(self, module: Any) -> list[tuple[nn.Module, str]]:
        """Plain attributes of the module and its parts that the struct depends on."""
        modules = [module, *(part for _, part in self._parts)]
        return [(each, name) for each in modules for name in WATCHED if name in vars(each)]

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy."""
        return {**self.__dict__, "_struct": None, "_guard": None}


def matrix_of(linear: Any) -> Matrix:
    """The library's description of a linear layer that it can read; see `same_format`."""
    return (
        linear.in_place() if isinstance(linear, QuantizedLinear) else plain_matrix(linear.weight, linear.bias)
    )


def same_format(linears: list[Any], dtype: torch.dtype) -> bool:
    """Whether the library can read these linear layers, which are of one format, and inputs of `dtype`."""
    return dtype in DTYPES and all(map(_is_readable, linears)) and len(set(map(_format, linears))) == 1


def are_numbers(weight: Any, count: int, dtype: torch.dtype) -> bool:
    """Whether the library can read a tensor [count] of this dtype."""
    return weight is not None and weight.shape == (count,) and weight.dtype is dtype and _is_plain(weight)


def _is_readable(linear: Any) -> bool:
    if isinstance(linear, QuantizedLinear):
        return bool(linear.weight.is_cpu)
    if type(linear) not in (nn.Linear, NativeLinear) or linear.weight.dtype not in PLAIN:
        return False
    bias: torch.Tensor | None = linear.bias
    return _is_plain(linear.weight) and (bias is None or (bias.dtype in DTYPES and _is_plain(bias)))


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.is_cpu and weight.is_contiguous()


def _format(linear: Any) -> Any:
    return linear.layout.format if isinstance(linear, QuantizedLinear) else linear.weight.dtype
