"""moe_mamba2_scan against float64: every instruction set, dtype, layout of heads."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from moe_local.offload.native.library import DTYPES
from moe_local.offload.native.linear_attention import Mamba2Scan
from support.packed import off

OK, BAD_ARGUMENT = 0, 1
OUTSIDE = 77.0
ROWS = 2
BOUND = 2e-6
"""Largest relative error, in the Frobenius norm. Answers and states are fp32, whatever the dtype."""
LIMITS = 0.02, 1.5


class Heads(NamedTuple):
    groups: int
    heads: int
    width: int
    states: int


class Tokens(NamedTuple):
    """Of some sequences: x [rows, tokens, heads, width], b, c [rows, tokens, groups, states] and dt [rows,
    tokens, heads]."""

    x: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    dt: torch.Tensor

    def some(self, first: int, last: int) -> Tokens:
        return Tokens(*(each[:, first:last].clone() for each in self))


class Layer(NamedTuple):
    """What the heads have; dt_bias and d may be None."""

    dt_bias: torch.Tensor | None
    a: torch.Tensor
    d: torch.Tensor | None
    softplus: bool = True
    limits: tuple[float, float] = LIMITS


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)


class Guarded:
    """Room for an output between numbers that nothing may change."""

    def __init__(self, *shape: int) -> None:
        count = torch.Size(shape).numel()
        self.memory = torch.full((count + 32,), OUTSIDE)
        self.output = self.memory[16 : 16 + count].view(shape)

    def checked(self) -> torch.Tensor:
        assert (self.memory[:16] == OUTSIDE).all()
        assert (self.memory[-16:] == OUTSIDE).all()
        return self.output


def call_of(tokens: Tokens, layer: Layer, state: torch.Tensor, y: torch.Tensor) -> Mamba2Scan:
    x, b, c, dt = tokens
    pointers = (
        None if each is None else each.data_ptr()
        for each in (x, b, c, dt, layer.dt_bias, layer.a, layer.d, state, y)
    )
    strides = (x.stride(1), b.stride(1), dt.stride(1))
    sizes = (*x.shape[:3], b.shape[2], x.shape[3], b.shape[3])
    return Mamba2Scan(*pointers, *strides, *sizes, *layer.limits, DTYPES[x.dtype], layer.softplus)


def scanned(lib: Any, tokens: Tokens, layer: Layer, state: torch.Tensor, threads: int = 3) -> torch.Tensor:
    """The answers; the state [rows, heads, width, states] is updated."""
    y, room = Guarded(*tokens.x.shape), Guarded(*state.shape)
    room.output.copy_(state)
    call = call_of(tokens, layer, room.output, y.output)
    assert lib.moe_mamba2_scan(ctypes.byref(call), threads) == OK
    state.copy_(room.checked())
    return y.checked()


class Call(NamedTuple):
    tokens: Tokens
    y: torch.Tensor
    state: torch.Tensor


@cache
def calls(
    heads: Heads, dtype: torch.dtype, biased: bool, softplus: bool, lengths: tuple[int, ...]
) -> tuple[Layer, torch.Tensor, list[Call]]:
    """Heads, a state, and what calls of these lengths make of it, one after the other, in float64. Some heads
    forget little, some all at once; some time steps are outside of the limits."""
    generator = torch.Generator().manual_seed(heads.width + heads.states)
    sizes = torch.tensor([1e-3, 1.0, 100.0])[torch.arange(heads.heads) % 3]
    layer = Layer(
        draw(generator, dtype, heads.heads) if biased else None,
        -draw(generator, torch.float32, heads.heads).abs() * sizes,
        draw(generator, torch.float32, heads.heads) if biased else None,
        softplus,
    )
    first = draw(generator, torch.float32, ROWS, heads.heads, heads.width, heads.states)
    state, found = first.double(), []
    for length in lengths:
        of_groups = ROWS, length, heads.groups, heads.states
        tokens = Tokens(
            draw(generator, dtype, ROWS, length, heads.heads, heads.width),
            *(draw(generator, dtype, *of_groups) for _ in "bc"),
            2 * draw(generator, dtype, ROWS, length, heads.heads),
        )
        dt = tokens.dt if layer.dt_bias is None else tokens.dt + layer.dt_bias  # rounded as in transformers
        dt = (F.softplus(dt) if softplus else dt).clamp(*LIMITS).double()
        b, c = (each.double().repeat_interleave(heads.heads // heads.groups, 2) for each in tokens[1:3])
        y = []
        for t in range(length):
            x = tokens.x[:, t].double()
            factor = (dt[:, t] * layer.a.double()).exp()
            state = factor[..., None, None] * state
            state = state + (dt[:, t, :, None] * x)[..., None] * b[:, t, :, None]
            y.append((state @ c[:, t, :, :, None]).squeeze(-1))
            if layer.d is not None:
                y[-1] = y[-1] + layer.d.double()[:, None] * x
        found.append(Call(tokens, torch.stack(y, dim=1), state))
    return layer, first, found


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads",
    [
        *(Heads(1, 1, 1, 16), Heads(2, 4, 6, 32), Heads(1, 3, 5, 48), Heads(2, 12, 64, 128)),
        *(Heads(1, 9, 3, 16), Heads(3, 3, 8, 80)),
    ],
)
def test_the_scan(lib: Any, isa: str, heads: Heads, dtype: torch.dtype, biased: bool, softplus: bool) -> None:
    """Calls for ever more tokens, each of which goes on from the state that those before it leave."""
    layer, first, found = calls(heads, dtype, biased, softplus, (1, 2, 3, 5, 17, 35, 1))
    state = first.clone()
    for tokens, y, want_state in found:
        got = scanned(lib, tokens, layer, state)
        assert off(got, y) <= BOUND
        for row in range(ROWS):
            for head in range(heads.heads):  # whose answer to one token may nearly cancel out
                assert off(got[row, :, head], y[row, :, head]) <= 20 * BOUND
                assert off(state[row, head], want_state[row, head]) <= BOUND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,) * 35, (16, 19), (3, 1, 31), (34, 1)])
def test_a_prompt_in_pieces_gives_the_same_bits(
    lib: Any, isa: str, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer, first, [(tokens, *_)] = calls(Heads(2, 6, 7, 48), dtype, True, True, (35,))
    at_once, pieces, answers, start = first.clone(), first.clone(), [], 0
    want = scanned(lib, tokens, layer, at_once)
    for length in lengths:
        answers.append(scanned(lib, tokens.some(start, start + length), layer, pieces))
        start += length
    assert torch.equal(torch.cat(answers, dim=1), want)
    assert torch.equal(pieces, at_once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 6, 33])
def test_slices_of_a_wider_array_are_read_where_they_lie(
    lib: Any, isa: str, count: int, dtype: torch.dtype
) -> None:
    layer, first, [(tokens, *_)] = calls(Heads(2, 4, 5, 32), dtype, True, True, (count,))
    plain, sliced = first.clone(), first.clone()
    want = scanned(lib, tokens, layer, plain)
    sizes = [each[0, 0].numel() for each in tokens]
    array = torch.full((ROWS, count, sum(sizes) + 9), torch.nan, dtype=dtype)
    slices, start = [], 3
    for part, size in zip(tokens, sizes, strict=True):
        array[..., start : start + size] = part.flatten(2)
        strides = (*array.stride()[:2], *part.shape[3:], 1)
        slices.append(array.as_strided(part.shape, strides, start))
        start += size + 1
    assert torch.equal(scanned(lib, Tokens(*slices), layer, sliced), want)
    assert torch.equal(sliced, plain)


def test_threads_change_nothing(lib: Any, isa: str) -> None:
    layer, first, [(tokens, *_)] = calls(Heads(2, 12, 64, 128), torch.bfloat16, True, True, (35,))
    alone, together = first.clone(), first.clone()
    one, many = (
        scanned(lib, tokens, layer, state, threads) for state, threads in ((alone, 1), (together, 8))
    )
    assert torch.equal(one, many)
    assert torch.equal(alone, together)


def test_limits_are_rounded_to_the_dtype(lib: Any, isa: str) -> None:
    """As torch.clamp does. Each token adds its time step to the state, and answers with it."""
    for dtype in DTYPES:
        dt = torch.tensor([-8.0, 0.5, 8.0]).to(dtype).view(1, 3, 1)
        ones = torch.zeros(1, 3, 1, 16, dtype=dtype)
        ones[..., 0] = 1
        tokens = Tokens(torch.ones(1, 3, 1, 1, dtype=dtype), ones, ones, dt)
        layer = Layer(None, torch.full((1,), -math.inf), None, False, (0.001, 1.3))
        got = scanned(lib, tokens, layer, torch.zeros(1, 1, 1, 16))
        assert torch.equal(got.view(3), dt.clamp(0.001, 1.3).float().view(3))


def test_a_number_that_is_none_spoils_what_comes_after_it(lib: Any, isa: str) -> None:
    """Of x, its row of its head, from its token on; of dt, all of its head."""
    layer, first, [(tokens, *_)] = calls(Heads(2, 6, 7, 48), torch.float32, True, True, (35,))
    clean, spoilt = first.clone(), first.clone()
    want = scanned(lib, tokens, layer, clean)
    tokens = tokens._replace(x=tokens.x.clone(), dt=tokens.dt.clone())
    tokens.x[1, 21, 2, 5] = torch.nan
    tokens.dt[0, 9, 4] = torch.nan
    got = scanned(lib, tokens, layer, spoilt)
    for row, heads, rows, first_token in ((1, 2, 5, 21), (0, 4, slice(None), 9)):
        assert got[row, first_token:, heads, rows].isnan().all()
        assert spoilt[row, heads, rows].isnan().all()
        got[row, first_token:, heads, rows] = want[row, first_token:, heads, rows]
        spoilt[row, heads, rows] = clean[row, heads, rows]
    assert torch.equal(got, want)
    assert torch.equal(spoilt, clean)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in ("x", "b", "c", "dt", "a", "state", "y")),
        *((name, 0) for name in ("rows", "tokens", "heads", "groups", "width", "states")),
        *(("tokens", -1), ("groups", 3), ("states", 24), ("dtype", 3), ("dtype", -1)),
    ],
)
def test_scans_that_make_no_sense_are_refused(lib: Any, field: str, value: Any) -> None:
    shapes = [(1, 2, 4, 8), (1, 2, 2, 16), (1, 2, 2, 16), (1, 2, 4)]
    tokens = Tokens(*(torch.zeros(shape) for shape in shapes))
    layer = Layer(None, torch.zeros(4), None)
    state, y = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 4, 8)
    call, scan = call_of(tokens, layer, state, y), lib.moe_mamba2_scan
    assert scan(ctypes.byref(call), 1) == OK
    assert scan(None, 1) == scan(ctypes.byref(call), 0) == BAD_ARGUMENT
    setattr(call, field, value)
    assert scan(ctypes.byref(call), 1) == BAD_ARGUMENT
