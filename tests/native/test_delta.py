"""moe_delta_rule and the convolutions against float64: every instruction set, dtype, layout of heads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from moe_local.offload.native.library import (
    DTYPES,
)
from moe_local.offload.native.linear_attention import (
    Convolution,
    DeltaRule,
    SequenceConvolution,
)
from support.packed import off

OK, BAD_ARGUMENT = 0, 1
OUTSIDE = 77.0
ROWS = 2
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Largest relative error, in the Frobenius norm."""


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)


class Guarded:
    """Room for an output between numbers that nothing may change."""

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        count = torch.Size(shape).numel()
        self.memory = torch.full((count + 32,), OUTSIDE, dtype=dtype)
        self.output = self.memory[16 : 16 + count].view(shape)

    def checked(self) -> torch.Tensor:
        assert (self.memory[:16] == OUTSIDE).all()
        assert (self.memory[-16:] == OUTSIDE).all()
        return self.output


class Heads(NamedTuple):
    keys: int
    values: int
    key_width: int
    value_width: int


class Tokens(NamedTuple):
    """Of some sequences: q, k [rows, tokens, key heads, key width], v, beta and decay."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor

    def one(self, t: int) -> Tokens:
        return Tokens(*(x[:, t : t + 1].clone() for x in self))


def draw_tokens(generator: torch.Generator, dtype: torch.dtype, heads: Heads, count: int) -> Tokens:
    """Keys are shorter than one, or else states would grow. Some heads forget little, some all at once."""
    keys, values = (ROWS, count, heads.keys, heads.key_width), (ROWS, count, heads.values, heads.value_width)
    sizes = torch.tensor([1e-3, 1.0, 100.0])[(torch.arange(ROWS)[:, None] + torch.arange(heads.values)) % 3]
    return Tokens(
        draw(generator, dtype, *keys),
        (0.9 * F.normalize(draw(generator, torch.float32, *keys), dim=-1)).to(dtype),
        draw(generator, dtype, *values),
        draw(generator, dtype, *values[:3]).sigmoid(),
        -draw(generator, torch.float32, *values[:3]).abs() * sizes[:, None],
    )


def rule(tokens: Tokens, state: torch.Tensor, y: torch.Tensor, normalized: bool = True) -> DeltaRule:
    _, k, v, *_ = tokens
    pointers = (x.data_ptr() for x in (*tokens, state, y))
    sizes = (*k.shape[:3], v.shape[2], k.shape[3], v.shape[3])
    return DeltaRule(*pointers, k.stride(1), v.stride(1), *sizes, DTYPES[v.dtype], normalized)


def ruled(
    lib: Any, tokens: Tokens, state: torch.Tensor, normalized: bool = True, threads: int = 3
) -> torch.Tensor:
    """The answers; the state [rows, heads, key width, value width] is updated."""
    y, room = Guarded(tokens.v.dtype, *tokens.v.shape), Guarded(torch.float32, *state.shape)
    room.output.copy_(state)
    assert lib.moe_delta_rule(ctypes.byref(rule(tokens, room.output, y.output, normalized)), threads) == OK
    state.copy_(room.checked())
    return y.checked()


class Step(NamedTuple):
    tokens: Tokens
    y: torch.Tensor
    state: torch.Tensor


@cache
def steps(
    heads: Heads, dtype: torch.dtype, normalized: bool, lengths: tuple[int, ...]
) -> tuple[torch.Tensor, list[Step]]:
    """A state, and what calls of these lengths make of it, one after the other, in float64."""
    generator = torch.Generator().manual_seed(heads.key_width)
    first = draw(generator, torch.float32, ROWS, heads.values, heads.key_width, heads.value_width)
    state, found = first.double(), []
    for length in lengths:
        tokens, y = draw_tokens(generator, dtype, heads, length), []
        shared = heads.values // heads.keys
        queries, keys = (x.double().repeat_interleave(shared, dim=2) for x in tokens[:2])
        if normalized:
            queries, keys = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (queries, keys))
        factors = tokens.decay.double().exp()
        for t in range(length):
            state = state * factors[:, t, :, None, None]
            known = torch.einsum("rhk,rhkv->rhv", keys[:, t], state)
            change = (tokens.v[:, t].double() - known) * tokens.beta[:, t, :, None].double()
            state = state + keys[:, t, :, :, None] * change[:, :, None]
            y.append(torch.einsum("rhk,rhkv->rhv", queries[:, t], state) / heads.key_width**0.5)
        found.append(Step(tokens, torch.stack(y, dim=1), state))
    return first, found


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads",
    [
        *(Heads(1, 1, 1, 16), Heads(2, 4, 24, 16), Heads(2, 2, 128, 128), Heads(1, 3, 33, 208)),
        *(Heads(3, 3, 1, 48), Heads(1, 2, 64, 80)),
    ],
)
def test_the_delta_rule(lib: Any, isa: str, heads: Heads, dtype: torch.dtype, normalized: bool) -> None:
    """Calls for ever more tokens, each of which goes on from the state that those before it leave."""
    state, calls = steps(heads, dtype, normalized, (1, 2, 3, 5, 33, 70, 1))
    state = state.clone()
    for tokens, y, want_state in calls:
        got = ruled(lib, tokens, state, normalized)
        assert off(got, y) <= BOUNDS[dtype]
        for row in range(ROWS):
            for head in range(heads.values):  # whose answer to one token may nearly cancel out
                assert off(got[row, :, head], y[row, :, head]) <= 3 * BOUNDS[dtype]
                assert off(state[row, head], want_state[row, head]) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 7, 32, 70])
def test_several_tokens_are_as_one_by_one(lib: Any, isa: str, count: int, dtype: torch.dtype) -> None:
    heads = Heads(2, 4, 40, 112)
    first, [(tokens, *_)] = steps(heads, dtype, True, (count,))
    at_once, one_by_one = first.clone(), first.clone()
    got = ruled(lib, tokens, at_once)
    want = [ruled(lib, tokens.one(t), one_by_one) for t in range(count)]
    assert off(got, torch.cat(want, dim=1).double()) <= BOUNDS[dtype]
    assert off(at_once, one_by_one.double()) <= BOUNDS[torch.float32]


def within(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same numbers as slices of one array [rows, tokens, ...], between NaN."""
    sizes = [x[0, 0].numel() for x in parts]
    apart = sum(sizes) + 3 * len(parts)
    array = torch.full((*parts[0].shape[:2], apart), torch.nan, dtype=parts[0].dtype)
    slices, start = [], 2
    for part, size in zip(parts, sizes, strict=True):
        strides = (*array.stride()[:2], part.shape[3], 1)
        slices.append(array.as_strided(part.shape, strides, start).copy_(part))
        start += size + 3
    return slices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 6, 33])
def test_slices_of_a_wider_array_are_read_where_they_lie(
    lib: Any, isa: str, count: int, dtype: torch.dtype
) -> None:
    first, [(tokens, *_)] = steps(Heads(1, 3, 33, 48), dtype, True, (count,))
    plain = first.clone()
    want = ruled(lib, tokens, plain)
    one = Tokens(*within(tokens[:3]), *tokens[3:])
    two = Tokens(*within(tokens[:2]), *within(tokens[2:3]), *tokens[3:])
    assert one.k.stride(1) == one.v.stride(1) != two.k.stride(1) != two.v.stride(1)
    for slices in (one, two):
        state = first.clone()
        assert torch.equal(ruled(lib, slices, state), want)
        assert torch.equal(state, plain)


def test_threads_change_nothing(lib: Any, isa: str) -> None:
    first, [(tokens, *_)] = steps(Heads(2, 4, 40, 112), torch.bfloat16, True, (70,))
    alone, together = first.clone(), first.clone()
    assert torch.equal(ruled(lib, tokens, alone, threads=1), ruled(lib, tokens, together, threads=8))
    assert torch.equal(alone, together)


def test_a_number_that_is_none_spoils_what_comes_after_it(lib: Any, isa: str) -> None:
    """A number that is none spoils its column of its head, from its token on."""
    first, [(tokens, *_)] = steps(Heads(2, 4, 40, 112), torch.float32, True, (33,))
    clean, spoilt = first.clone(), first.clone()
    want = ruled(lib, tokens, clean)
    tokens = tokens._replace(v=tokens.v.clone())
    tokens.v[1, 21, 2, 100] = torch.nan
    got = ruled(lib, tokens, spoilt)
    assert got[1, 21:, 2, 100].isnan().all()
    assert spoilt[1, 2, :, 100].isnan().all()
    got[1, 21:, 2, 100] = want[1, 21:, 2, 100]
    spoilt[1, 2, :, 100] = clean[1, 2, :, 100]
    assert torch.equal(got, want)
    assert torch.equal(spoilt, clean)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "taps", "biased"), [(1, 1, False), (300, 4, False), (513, 3, True)])
def test_the_convolution(
    lib: Any, isa: str, channels: int, taps: int, biased: bool, dtype: torch.dtype, silu: bool
) -> None:
    generator = torch.Generator().manual_seed(channels)
    state = draw(generator, dtype, ROWS, channels, taps)
    weight, bias = draw(generator, dtype, channels, taps), draw(generator, dtype, channels)
    for _ in range(2):
        x = draw(generator, dtype, ROWS, channels)
        inputs = torch.cat([state[..., 1:], x[..., None]], dim=-1)
        want = (inputs.double() * weight.double()).sum(-1) + (bias.double() if biased else 0)
        y = Guarded(dtype, ROWS, channels)
        call = Convolution(
            *(x.data_ptr(), state.data_ptr(), weight.data_ptr(), bias.data_ptr() if biased else None),
            *(y.output.data_ptr(), ROWS, channels, taps, DTYPES[dtype], silu),
        )
        assert lib.moe_convolve(ctypes.byref(call), 3) == OK
        assert torch.equal(state, inputs)
        assert off(y.checked(), F.silu(want) if silu else want) <= BOUNDS[dtype]


class Sequences(NamedTuple):
    """Whole sequences for a convolution, x [rows, channels, tokens]; and what it gives, before silu, y
    [rows, tokens, channels]."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    y: torch.Tensor


@cache
def sequences(
    rows: int, channels: int, tokens: int, taps: int, biased: bool, dtype: torch.dtype
) -> Sequences:
    generator = torch.Generator().manual_seed(channels)
    x, weight = draw(generator, dtype, rows, channels, tokens), draw(generator, dtype, channels, taps)
    bias = draw(generator, dtype, channels) if biased else None
    y = F.conv1d(
        F.pad(x.double(), (taps - 1, 0)),
        weight.double()[:, None],
        None if bias is None else bias.double(),
        groups=channels,
    )
    return Sequences(x, weight, bias, y.transpose(1, 2))


def in_memory(x: torch.Tensor, order: str) -> torch.Tensor:
    """x [rows, channels, tokens], with a channel's tokens together or a token's channels, between NaN."""
    shape = [x.shape[0], *(x.shape[1:] if order == "tokens" else x.shape[:0:-1])]
    array = torch.full((shape[0], shape[1] + 2, shape[2] + 5), torch.nan, dtype=x.dtype)[:, 1:-1, 3:-2]
    view = array if order == "tokens" else array.transpose(1, 2)
    view.copy_(x)
    return view


def convolved(lib: Any, given: Sequences, x: torch.Tensor, silu: bool, threads: int = 3) -> torch.Tensor:
    y, bias = Guarded(x.dtype, *given.y.shape), given.bias
    call = SequenceConvolution(
        *(x.data_ptr(), given.weight.data_ptr(), None if bias is None else bias.data_ptr()),
        *(y.output.data_ptr(), *x.stride(), *x.shape, given.weight.shape[1], DTYPES[x.dtype], silu),
    )
    assert lib.moe_convolve_sequences(ctypes.byref(call), threads) == OK
    return y.checked()


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["tokens", "channels"])
@pytest.mark.parametrize(
    ("rows", "channels", "tokens", "taps", "biased"),
    [
        *((1, 1, 1, 1, True), (2, 300, 3, 4, False), (1, 16, 4, 4, True), (3, 17, 64, 4, True)),
        *((2, 513, 65, 3, False), (1, 256, 200, 4, True), (2, 24, 129, 70, True), (1, 272, 128, 1, False)),
    ],
)
def test_the_convolution_of_sequences(
    lib: Any,
    isa: str,
    rows: int,
    channels: int,
    tokens: int,
    taps: int,
    biased: bool,
    order: str,
    dtype: torch.dtype,
    silu: bool,
) -> None:
    given = sequences(rows, channels, tokens, taps, biased, dtype)
    got = convolved(lib, given, in_memory(given.x, order), silu)
    want = F.silu(given.y) if silu else given.y
    for row, t in ((row, t) for row in range(rows) for t in range(tokens)):
        assert off(got[row, t], want[row, t]) <= 3 * BOUNDS[dtype], (row, t)
    assert off(got, want) <= BOUNDS[dtype]
    if dtype is not torch.float32:  # sums are rounded as well, so that few answers are other numbers
        sums = given.y.to(dtype).float()
        assert (got != (F.silu(sums) if silu else sums).to(dtype)).float().mean() < 0.01
    assert torch.equal(convolved(lib, given, given.x, silu, threads=1), got)


def test_a_number_that_is_none_reaches_as_far_as_the_taps(lib: Any, isa: str) -> None:
    for order in ("tokens", "channels"):
        given = sequences(2, 300, 130, 4, False, torch.float32)
        x = in_memory(given.x, order)
        want = convolved(lib, given, x, True)
        x[1, 259, 62] = torch.nan
        got = convolved(lib, given, x, True)
        assert got[1, 62:66, 259].isnan().all()
        got[1, 62:66, 259] = want[1, 62:66, 259]
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in ("q", "k", "v", "beta", "decay", "state", "y")),
        *((name, 0) for name in ("rows", "tokens", "key_heads", "value_heads", "key_width", "value_width")),
        *(("tokens", -1), ("value_heads", 3), ("value_width", 24), ("dtype", 3), ("dtype", -1)),
    ],
)
def test_rules_that_make_no_sense_are_refused(lib: Any, field: str, value: Any) -> None:
    shapes = [(1, 2, 2, 8), (1, 2, 2, 8), (1, 2, 4, 16), (1, 2, 4), (1, 2, 4)]
    tokens = Tokens(*(torch.zeros(shape) for shape in shapes))
    state, y = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 4, 16)
    call = rule(tokens, state, y)
    assert lib.moe_delta_rule(ctypes.byref(call), 1) == OK
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
    assert lib.moe_convolve(ctypes.byref(call), 1) == OK
    assert lib.moe_convolve(None, 1) == lib.moe_convolve(ctypes.byref(call), 0) == BAD_ARGUMENT
    setattr(call, field, value)
    assert lib.moe_convolve(ctypes.byref(call), 1) == BAD_ARGUMENT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in ("x", "weight", "y")),
        *((name, 0) for name in ("rows", "channels", "tokens", "taps")),
        *(("tokens", -1), ("token_stride", 2), ("dtype", 3), ("dtype", -1)),
    ],
)
def test_convolutions_of_sequences_that_make_no_sense_are_refused(lib: Any, field: str, value: Any) -> None:
    x, weight, y = torch.zeros(1, 5, 7), torch.zeros(5, 4), torch.zeros(1, 7, 5)
    pointers = (x.data_ptr(), weight.data_ptr(), None, y.data_ptr())
    call = SequenceConvolution(*pointers, *x.stride(), *x.shape, 4, 0, 1)
    convolve = lib.moe_convolve_sequences
    assert convolve(ctypes.byref(call), 1) == OK
    assert convolve(None, 1) == convolve(ctypes.byref(call), 0) == BAD_ARGUMENT
    setattr(call, field, value)
    assert convolve(ctypes.byref(call), 1) == BAD_ARGUMENT
