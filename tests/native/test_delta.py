"""moe_delta_rule and moe_convolve against float64: every instruction set, dtype, layout of heads."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_local.offload.native.library import DTYPES, Convolution, DeltaRule

BAD_ARGUMENT = 1
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Largest relative error, in the Frobenius norm."""


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def rule(tensors: list[torch.Tensor], state: torch.Tensor, y: torch.Tensor, normalized: bool) -> DeltaRule:
    q, _, v, *_ = tensors
    sizes = (*q.shape[:2], v.shape[1], q.shape[2], v.shape[2])
    pointers = (x.data_ptr() for x in (*tensors, state, y))
    return DeltaRule(*pointers, *sizes, DTYPES[v.dtype], normalized)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("key_heads", "value_heads", "key_width", "value_width"),
    [(1, 1, 1, 16), (2, 4, 24, 16), (2, 2, 128, 128), (1, 3, 33, 208)],
)
def test_the_delta_rule(
    lib: Any,
    isa: str,
    key_heads: int,
    value_heads: int,
    key_width: int,
    value_width: int,
    dtype: torch.dtype,
    normalized: bool,
) -> None:
    """Three tokens of two sequences; the state is what they leave."""
    generator, rows = torch.Generator().manual_seed(key_width), 2
    state = draw(generator, torch.float32, rows, value_heads, key_width, value_width)
    want_state = state.double()
    for _ in range(3):
        q, k = (draw(generator, dtype, rows, key_heads, key_width) for _ in range(2))
        k = k if normalized else k / key_width**0.5
        v = draw(generator, dtype, rows, value_heads, value_width)
        beta = draw(generator, dtype, rows, value_heads).sigmoid()
        decay = -draw(generator, torch.float32, rows, value_heads).abs()
        y = torch.full_like(v, 77)
        tensors = [q, k, v, beta, decay]
        assert lib.moe_delta_rule(ctypes.byref(rule(tensors, state, y, normalized)), 3) == 0
        wide = [x.double().repeat_interleave(value_heads // key_heads, dim=1) for x in (q, k)]
        if normalized:
            wide = [x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in wide]
        query, key = wide
        want_state = want_state * decay.double().exp()[..., None, None]
        change = (v.double() - torch.einsum("rhk,rhkv->rhv", key, want_state)) * beta.double()[..., None]
        want_state = want_state + key[..., None] * change[..., None, :]
        want = torch.einsum("rhk,rhkv->rhv", query, want_state) / key_width**0.5
        assert error(y, want) <= BOUNDS[dtype]
        assert error(state, want_state) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "taps", "biased"), [(1, 1, False), (300, 4, False), (513, 3, True)])
def test_the_convolution(
    lib: Any, isa: str, channels: int, taps: int, biased: bool, dtype: torch.dtype, silu: bool
) -> None:
    generator, rows = torch.Generator().manual_seed(channels), 2
    state = draw(generator, dtype, rows, channels, taps)
    weight, bias = draw(generator, dtype, channels, taps), draw(generator, dtype, channels)
    for _ in range(2):
        x = draw(generator, dtype, rows, channels)
        inputs = torch.cat([state[..., 1:], x[..., None]], dim=-1)
        want = (inputs.double() * weight.double()).sum(-1) + (bias.double() if biased else 0)
        y = torch.full_like(x, 77)
        call = Convolution(
            *(x.data_ptr(), state.data_ptr(), weight.data_ptr(), bias.data_ptr() if biased else None),
            *(y.data_ptr(), rows, channels, taps, DTYPES[dtype], silu),
        )
        assert lib.moe_convolve(ctypes.byref(call), 3) == 0
        assert torch.equal(state, inputs)
        assert error(y, F.silu(want) if silu else want) <= BOUNDS[dtype]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in ("q", "k", "v", "beta", "decay", "state", "y")),
        *((name, 0) for name in ("rows", "key_heads", "value_heads", "key_width", "value_width")),
        *(("value_heads", 3), ("value_width", 24), ("dtype", 3), ("dtype", -1)),
    ],
)
def test_rules_that_make_no_sense_are_refused(lib: Any, field: str, value: Any) -> None:
    shapes = [(1, 2, 8), (1, 2, 8), (1, 4, 16), (1, 4), (1, 4)]
    tensors, state, y = [torch.zeros(s) for s in shapes], torch.zeros(1, 4, 8, 16), torch.zeros(1, 4, 16)
    call = rule(tensors, state, y, False)
    assert lib.moe_delta_rule(ctypes.byref(call), 1) == 0
    assert lib.moe_delta_rule(None, 1) == lib.moe_delta_rule(ctypes.byref(call), 0) == BAD_ARGUMENT
    setattr(call, field, value)
    assert lib.moe_delta_rule(ctypes.byref(call), 1) == BAD_ARGUMENT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in ("x", "state", "weight", "y")),
        *((name, 0) for name in ("rows", "channels", "taps")),
        ("dtype", 3),
    ],
)
def test_convolutions_that_make_no_sense_are_refused(lib: Any, field: str, value: Any) -> None:
    x, state, weight, y = torch.zeros(1, 5), torch.zeros(1, 5, 4), torch.zeros(5, 4), torch.zeros(1, 5)
    pointers = (x.data_ptr(), state.data_ptr(), weight.data_ptr(), None, y.data_ptr())
    call = Convolution(*pointers, 1, 5, 4, 0, 1)
    assert lib.moe_convolve(ctypes.byref(call), 1) == 0
    assert lib.moe_convolve(None, 1) == lib.moe_convolve(ctypes.byref(call), 0) == BAD_ARGUMENT
    setattr(call, field, value)
    assert lib.moe_convolve(ctypes.byref(call), 1) == BAD_ARGUMENT
