"""moe_attention against float64: every instruction set, dtype, format, rotation, length, layout of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe_local.offload.native.library import (
    BF16,
    DTYPES,
    FLOATS,
    FORMATS,
    HALVES,
    INT16,
    NEIGHBOURS,
)
from support.attention_calls import OUTSIDE, SPANS, Call, Case, Together
from support.packed import UNLIKE, off
from support.variants import others_slow

BAD_ARGUMENT = 1
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Largest relative error, in the Frobenius norm."""

ROUNDED = {FLOATS: 0.0, INT16: 1e-4, BF16: 1e-4}
"""What the activations' rounding adds to it."""


def check(lib: Any, case: Case, activations: int = FLOATS) -> None:
    """The answer is right, and so are the key and value written; nothing else is."""
    call = Call(case)
    want = call.reference()
    before = call.keys.clone(), call.values.clone()
    y = call.answer(lib, activations=activations)
    allowed = BOUNDS[case.dtype] + ROUNDED[activations]
    for after, old, new in zip((call.keys, call.values), before, want[1:], strict=True):
        assert off(after[:, case.last], new) < allowed, case
        after[:, case.last] = old[:, case.last]
        assert torch.equal(after.view(torch.uint8), old.view(torch.uint8)), case
    assert off(y, want[0]) < allowed, case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_exact_answer(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    case = Case(format=format, dtype=dtype, norms=True, sinks=True, bias=torch.float32)
    for activations in (FLOATS, INT16, BF16):
        check(lib, case, activations)
    check(lib, case._replace(hidden=72, width=48, rotated=48, bias=None))  # no whole blocks of 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2), (14, 2)])
def test_heads_of_any_width(lib: Any, isa: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for width in (16, 48, 64, 128, 256):
        check(lib, Case(*heads, width=width, rotated=width, dtype=dtype, norms=width == 48))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_gates_and_shifted_norms(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    case = Case(format=format, dtype=dtype, norms=True, gated=True, shifted=True)
    check(lib, case)
    check(lib, case._replace(heads=6, width=48, rotated=12, last=300, hidden=200, bias=torch.float32))


@pytest.mark.parametrize("rotation", [HALVES, NEIGHBOURS])
@pytest.mark.parametrize("shared", [False, True])
def test_rotations(lib: Any, isa: str, rotation: int, shared: bool) -> None:
    for width, rotated in ((16, 16), (16, 0), (16, 2), (64, 32), (64, 14), (128, 128), (48, 46)):
        case = Case(width=width, rotated=rotated, rotation=rotation, shared=shared, last=3)
        for dtype in DTYPES:
            check(lib, case._replace(dtype=dtype, norms=dtype != torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1000])
def test_any_number_of_positions(lib: Any, isa: str, length: int, dtype: torch.dtype) -> None:
    for first, spare in ((0, 0), (0, 5), (1, 5), (13, 0), (300, 5)):
        case = Case(dtype=dtype, first=first, last=first + length - 1, spare=spare)
        check(lib, case._replace(heads=10, sinks=spare == 5))


@pytest.mark.parametrize("bias", DTYPES)
def test_biases_of_any_dtype(lib: Any, isa: str, bias: torch.dtype) -> None:
    for format in FORMATS:
        check(lib, Case(format=format, bias=bias))


def test_scores_far_apart_and_far_from_zero(lib: Any, isa: str) -> None:
    """A softmax that is not careful makes infinities of them, in one look or between looks."""
    for scale in (1e2, 1e4, -1e4):
        call = Call(Case(last=600, sinks=True, bias=torch.float32))
        call.keys *= scale
        want, _, _ = call.reference()
        assert off(call.answer(lib), want) < 3e-4  # floats hold no more of scores that large
        assert call.sinks is not None
        call.sinks.fill_(1e6)
        assert torch.equal(call.answer(lib).double(), call.matrices["o"].bias)


@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_the_number_of_threads_changes_no_bit(lib: Any, isa: str, format: str) -> None:
    case = Case(heads=8, kv_heads=4, width=64, rotated=64, hidden=576, format=format, last=700, gated=True)
    alone = Call(case)
    want = alone.answer(lib)
    for threads in (2, 3, 64, 1000):
        call = Call(case)
        assert torch.equal(call.answer(lib, threads=threads), want)
        for got, once in ((call.keys, alone.keys), (call.values, alone.values)):
            assert torch.equal(got.view(torch.int32), once.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_number_that_is_none_spoils_all(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    for last in (0, 300):
        for activations in (FLOATS, INT16, BF16):
            call = Call(Case(format=format, dtype=dtype, norms=True, last=last))
            call.x[5] = float("nan")
            assert call.answer(lib, activations=activations).isnan().all()
            assert call.keys[:, last].isnan().all()
            assert call.values[:, last].isnan().all()


def test_an_earlier_number_that_is_none_spoils_the_answer(lib: Any, isa: str) -> None:
    for position in (0, 5, 255, 256, 299):
        for name, bad in (("keys", "nan"), ("values", "inf"), ("values", "nan")):
            call = Call(Case(heads=5, kv_heads=1, last=300))
            assert torch.isfinite(call.answer(lib)).all()
            getattr(call, name)[0, position] = float(bad)
            assert not torch.isfinite(call.answer(lib)).any()


def test_the_reference_agrees_with_torch(lib: Any, isa: str) -> None:
    call = Call(Case(heads=4, kv_heads=2, width=64, rotated=0, last=40))
    q, k, v = (call.matrices[n].product(call.x[None].double()).float().view(-1, 1, 64) for n in "qkv")
    keys = torch.cat([call.keys[:, :40], k], 1)[None]
    values = torch.cat([call.values[:, :40], v], 1)[None]
    heads = nn.functional.scaled_dot_product_attention(q[None], keys, values, enable_gqa=True)
    want = call.matrices["o"].product(heads.reshape(1, -1))[0]
    assert off(call.answer(lib), want) < BOUNDS[torch.float32]


def put(of: Callable[[Call], Any], field: str, value: Any) -> Callable[[Call], Any]:
    return lambda call: setattr(of(call), field, value)


def of_struct(field: str, value: Any) -> Callable[[Call], Any]:
    return put(lambda call: call.struct, field, value)


def of_matrix(name: str, field: str, value: Any) -> Callable[[Call], Any]:
    return put(lambda call: getattr(call.struct, name), field, value)


def of_sequence(field: str, value: Any) -> Callable[[Call], Any]:
    return put(lambda call: call.sequence, field, value)


def argument(name: str, value: Any) -> Callable[[Call], Any]:
    return lambda call: call.arguments.__setitem__(name, value)


WRONG: dict[str, Callable[[Call], Any]] = {
    **{f"no {name}": argument(name, None) for name in ("attention", "x", "cos", "sin", "sequences", "y")},
    **{f"{name} without bytes": of_matrix(name, "q", None) for name in "qkvo"},
    **{f"{name} of no format": of_matrix(name, "format", max(FORMATS.values()) + 1) for name in "qkvo"},
    **{f"{name} of another format": of_matrix(name, "format", FORMATS["bf16"]) for name in "qkv"},
    **{f"{name} with fewer rows": of_matrix(name, "rows", 16) for name in "qkvo"},
    **{f"{name} with fewer columns": of_matrix(name, "cols", 32) for name in "qkvo"},
    **{f"{name} with a bias of no dtype": of_matrix(name, "bias_dtype", 3) for name in "qkvo"},
    **{f"{name} of zero": of_struct(name, 0) for name in ("heads", "kv_heads", "width")},
    **{f"negative {name}": of_struct(name, -2) for name in ("heads", "kv_heads", "width", "rotated")},
    "gates that q has no rows for": of_struct("gated", 1),
    "heads that share no keys": of_struct("kv_heads", 3),
    "more heads than rows": of_struct("heads", 8),
    "heads beyond all numbers": of_struct("heads", 2**62),
    "a width of no whole step": of_struct("width", 8),
    "a width beyond all numbers": of_struct("width", 2**62),
    "more to rotate than there is": of_struct("rotated", 18),
    "an odd number to rotate": of_struct("rotated", 3),
    "rotation below": of_struct("rotation", -1),
    "rotation above": of_struct("rotation", 2),
    "dtype below": of_struct("dtype", -1),
    "dtype above": of_struct("dtype", 3),
    "no keys": of_sequence("keys", None),
    "no values": of_sequence("values", None),
    "a negative stride": of_sequence("head_stride", -1),
    "heads that overlap": of_sequence("head_stride", 21 * 16 - 1),
    "a stride beyond all numbers": of_sequence("head_stride", 2**62),
    "a negative first": of_sequence("first", -1),
    "a first behind the last": of_sequence("first", 21),
    "a negative last": of_sequence("last", -1),
    "a last beyond all numbers": of_sequence("last", 2**62),
    "the largest last": of_sequence("last", 2**63 - 1),
    "no tokens": argument("tokens", 0),
    "more tokens than a call takes": argument("tokens", 257),
    "no threads": argument("threads", 0),
    "fewer than no threads": argument("threads", -4),
    "activations below": argument("activations", -1),
    "activations above": argument("activations", 4),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(lib: Any, wrong: str) -> None:
    call = Call(Case())
    call.answer(lib)
    for memory in (call.y, call.keys, call.values):
        memory.fill_(OUTSIDE)
    WRONG[wrong](call)
    assert call(lib) == BAD_ARGUMENT
    for memory in (call.y, call.keys, call.values):
        assert (memory == OUTSIDE).all()


def test_what_is_not_used_may_be_left_out(lib: Any) -> None:
    call = Call(Case(rotated=0))
    want = call.answer(lib)
    assert torch.equal(call.answer(lib, cos=call.x.data_ptr(), sin=call.x.data_ptr()), want)
    single = Call(Case(heads=2, kv_heads=1))
    want = single.answer(lib)
    single.sequence.head_stride = 0  # there is no second head
    assert torch.equal(single.answer(lib), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_each_of_several_tokens_has_what_it_has_alone(
    lib: Any, isa: str, format: str, dtype: torch.dtype
) -> None:
    """Bit for bit, if all are multiplied in registers; of many, within the bounds."""
    case = Case(format=format, dtype=dtype, norms=True, sinks=True, gated=True, bias=torch.float32)
    for spans, activations in (
        (SPANS[:4], FLOATS),
        (SPANS[:4], INT16),
        (4 * SPANS, INT16),
        (4 * SPANS, FLOATS),
    ):
        together = Together(case, spans)
        want = torch.stack([call.answer(lib, activations=activations) for call in together.calls])
        written = together.forget()
        for threads in (1, 3):
            arguments = together.arguments(activations=activations, threads=threads)
            assert lib.moe_attention(*arguments.values()) == 0
            pairs = [(together.y, want), *zip(together.forget(), written, strict=True)]
            for got, alone in pairs:
                if len(spans) <= 4:
                    assert torch.equal(got, alone)
                else:
                    assert off(got, alone.double()) < BOUNDS[dtype] + ROUNDED[activations]
