"""Calls of moe_mlp on random numbers, and what they are to give."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from moe_local.offload.native.library import DTYPES, FLOATS, Mlp
from support import packed
from support.attention_calls import OUTSIDE, AnyCall, matrix_of

IDENTITY, RELU, RELU2, SILU, GELU, GELU_TANH, CLAMPED_SWIGLU, CLAMPED_SILU = range(8)


class Case(NamedTuple):
    """`of_down` and `of_share`: formats of these matrices, unless they have that of the others."""

    width: int = 64
    hidden: int = 48
    tokens: int = 1
    function: int = SILU
    share: bool = False
    bias: torch.dtype | None = torch.float32
    format: str = "fp32"
    of_down: str | None = None
    of_share: str | None = None
    dtype: torch.dtype = torch.float32


class Call(AnyCall):
    """A call of moe_mlp for some tokens of random numbers."""

    function = "moe_mlp"

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "gate": (case.format, case.hidden, case.width),
            "up": (case.format, case.hidden, case.width),
            "down": (case.of_down or case.format, case.width, case.hidden),
            "share": (case.of_share or case.format, 1, case.width),
        }
        options: dict[str, Any] = {"bias": case.bias is not None, "bias_dtype": case.bias or torch.float32}
        self.matrices = {
            name: matrix_of(*shape, seed=seed + place, **options)
            for place, (name, shape) in enumerate(shapes.items())
        }
        size = float(self.matrices["gate"].weights.std()) * case.width**0.5  # that gates are about one
        x = torch.randn(case.tokens, case.width, generator=generator) / size
        self.x = packed.at_odd_address(x.to(case.dtype), 1).view(case.tokens, case.width)
        self.y = torch.full((case.tokens * case.width + 32,), OUTSIDE, dtype=case.dtype)
        # Copies, for calls to spoil: other calls have the same matrices.
        parts = (type(m.struct).from_buffer_copy(m.struct) for m in self.matrices.values())
        gate, up, down, self.share = parts
        self.struct = Mlp(gate, up, down, case.function, DTYPES[case.dtype])
        self.arguments: dict[str, Any] = {
            "mlp": ctypes.byref(self.struct),
            "share": ctypes.byref(self.share) if case.share else None,
            "x": self.x.data_ptr(),
            "tokens": case.tokens,
            "y": self.y[16:].data_ptr(),
            "activations": FLOATS,
            "threads": 1,
        }

    def reference(self) -> torch.Tensor:
        """y [tokens, D], in float64."""
        x = self.x.double()
        gate, up = (self.matrices[name].product(x) for name in ("gate", "up"))
        y: torch.Tensor = self.matrices["down"].product(activate(self.case.function, gate) * up)
        return y * self.matrices["share"].product(x).sigmoid() if self.case.share else y


def activate(function: int, x: torch.Tensor) -> torch.Tensor:
    return {
        IDENTITY: lambda: x,
        RELU: lambda: F.relu(x),
        RELU2: lambda: F.relu(x).square(),
        SILU: lambda: F.silu(x),
        GELU: lambda: F.gelu(x),
        GELU_TANH: lambda: F.gelu(x, approximate="tanh"),
    }[function]()
