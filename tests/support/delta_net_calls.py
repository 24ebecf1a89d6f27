"""Calls of moe_delta_net on random numbers, and what they are to give."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from moe_local.offload.native.library import DTYPES, FLOATS, DeltaNet
from support import packed
from support.attention_calls import OUTSIDE, AnyCall, matrix_of

EPSILON = 1e-5


class Case(NamedTuple):
    key_heads: int = 2
    value_heads: int = 4
    key_width: int = 24
    value_width: int = 32
    taps: int = 4
    hidden: int = 64
    rows: int = 1
    bias: torch.dtype | None = None
    """Of the matrices."""
    convolution_bias: bool = True
    format: str = "fp32"
    dtype: torch.dtype = torch.float32
    by_key_head: bool = False


class Call(AnyCall):
    """A call for one token of each of some rows, of random numbers."""

    function = "moe_delta_net"

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        values = case.value_heads * case.value_width
        channels = 2 * case.key_heads * case.key_width + values
        shapes = {
            "qkv": (channels, case.hidden),
            "z": (values, case.hidden),
            "b": (case.value_heads, case.hidden),
            "a": (case.value_heads, case.hidden),
            "o": (case.hidden, values),
        }
        if case.by_key_head:
            shapes |= {"qkv": (channels + values, case.hidden), "b": (2 * case.value_heads, case.hidden)}
            del shapes["z"], shapes["a"]
        options: dict[str, Any] = {"bias": case.bias is not None, "bias_dtype": case.bias or torch.float32}
        self.matrices = {
            name: matrix_of(case.format, *shape, seed=seed + place, **options)
            for place, (name, shape) in enumerate(shapes.items())
        }
        size = (
            float(self.matrices["qkv"].weights.std()) * case.hidden**0.5
        )  # so that projections are about one
        self.x = packed.at_odd_address((random(case.rows, case.hidden).float() / size).to(case.dtype), 1)
        self.x = self.x.view(case.rows, case.hidden)
        self.inputs = random(case.rows, channels, case.taps)
        self.states = random(
            case.rows, case.value_heads, case.key_width, case.value_width, dtype=torch.float32
        )
        self.convolution, self.convolution_bias = random(channels, case.taps), random(channels)
        self.a_log, self.dt_bias = random(case.value_heads), random(case.value_heads)
        self.norm = random(case.value_width)
        self.y = torch.full((case.rows * case.hidden + 32,), OUTSIDE, dtype=case.dtype)
        self.struct = struct = DeltaNet(**{name: matrix.struct for name, matrix in self.matrices.items()})
        for name in ("key_heads", "value_heads", "key_width", "value_width", "taps", "by_key_head"):
            setattr(struct, name, getattr(case, name))
        struct.convolution, struct.norm = self.convolution.data_ptr(), self.norm.data_ptr()
        struct.convolution_bias = self.convolution_bias.data_ptr() if case.convolution_bias else None
        struct.a_log, struct.dt_bias = self.a_log.data_ptr(), self.dt_bias.data_ptr()
        struct.epsilon, struct.dtype = EPSILON, DTYPES[case.dtype]
        self.arguments: dict[str, Any] = {
            "net": ctypes.byref(struct),
            "x": self.x.data_ptr(),
            "inputs": self.inputs.data_ptr(),
            "states": self.states.data_ptr(),
            "rows": case.rows,
            "y": self.y[16:].data_ptr(),
            "changes": None,
            "activations": FLOATS,
            "threads": 1,
        }

    def projected(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The product of x [rows, D] and each of Qwen3.5's four matrices; of Qwen3-Next's two, in the order
        in which its `fix_query_key_value_ordering` puts their rows."""
        case = self.case
        if not case.by_key_head:
            return [self.matrices[name].product(x) for name in ("qkv", "z", "b", "a")]
        shared = case.value_heads // case.key_heads
        widths = [case.key_width] * 2 + [shared * case.value_width] * 2
        of_heads = self.matrices["qkv"].product(x).view(case.rows, case.key_heads, -1).split(widths, -1)
        q, k, v, z = (part.reshape(case.rows, -1) for part in of_heads)
        b, a = self.matrices["b"].product(x).view(case.rows, case.key_heads, 2, shared).unbind(2)
        return [torch.cat([q, k, v], -1), z, b.reshape(case.rows, -1), a.reshape(case.rows, -1)]

    def left(self) -> int:
        """How many numbers are left for each row that is to be changed later."""
        case = self.case
        channels = 2 * case.key_heads * case.key_width + case.value_heads * case.value_width
        return channels + case.value_heads * (case.key_width + case.value_width + 1)

    def change(self, lib: Any, left: torch.Tensor, **changed: Any) -> int:
        """moe_change_states."""
        mine = {name: self.arguments[name] for name in ("rows", "inputs", "states", "threads")}
        arguments = {"net": self.arguments["net"], "changes": left.data_ptr(), **mine} | changed
        status: int = lib.moe_change_states(*arguments.values())
        return status

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y [rows, D] and the new inputs and states, as transformers' Qwen3.5 has them, but in float64."""
        case, x = self.case, self.x.double()
        qkv, z, b, a = self.projected(x)
        inputs = torch.cat([self.inputs[..., 1:].double(), qkv[..., None]], -1)
        mixed = (inputs * self.convolution.double()).sum(-1)
        mixed = F.silu(mixed + (self.convolution_bias.double() if case.convolution_bias else 0))
        keys = case.key_heads * case.key_width
        q, k = (part.view(case.rows, case.key_heads, -1) for part in mixed[:, : 2 * keys].chunk(2, -1))
        v = mixed[:, 2 * keys :].view(case.rows, case.value_heads, -1)
        q, k = (
            (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(
                case.value_heads // case.key_heads, 1
            )
            for part in (q, k)
        )
        decay = -self.a_log.double().exp() * F.softplus(a + self.dt_bias.double())
        states = self.states.double() * decay.exp()[..., None, None]
        change = b.sigmoid()[..., None] * (v - (states * k[..., None]).sum(-2))
        states = states + k[..., None] * change[..., None, :]
        answers = (states * q[..., None]).sum(-2) / case.key_width**0.5
        answers = answers * (answers.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * self.norm.double()
        answers = answers * F.silu(z.view(answers.shape))
        return self.matrices["o"].product(answers.reshape(case.rows, -1)), inputs, states
