"""moe_latent_attention against float64, for every instruction set, dtype and format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_local.offload.native.library import (
    APART,
    BAD_ARGUMENT,
    BF16,
    DTYPES,
    FLOATS,
    FORMATS,
    HALVES,
    INT8,
    INT16,
    NEIGHBOURS,
)
from support.latent_calls import Call, Case, Together
from support.packed import UNLIKE, off
from support.variants import others_slow

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Largest relative error, in the Frobenius norm."""

ROUNDED = {FLOATS: 0.0, INT16: 3e-4, BF16: 3e-4, INT8: 0.05}
"""What the activations' rounding adds to it."""

SPANS = [(0, 20), (0, 0), (3, 700), (250, 260), (0, 255), (7, 12)]


def check(lib: Any, case: Case, activations: int = FLOATS, threads: int = 1) -> None:
    """The answer is right, and so are the latent and key written; nothing else is."""
    call = Call(case)
    want = call.reference()
    before = call.latents.clone(), call.keys.clone()
    y = call.answer(lib, activations=activations, threads=threads)
    allowed = BOUNDS[case.dtype] + ROUNDED[activations]
    for after, old, new in zip((call.latents, call.keys), before, want[1:], strict=True):
        assert off(after[case.last], new) < allowed, case
        after[case.last] = old[case.last]
        assert torch.equal(after.view(torch.uint8), old.view(torch.uint8)), case
    assert off(y, want[0]) < allowed, case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_exact_answer(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    case = Case(format=format, dtype=dtype, bias=torch.float32)
    for activations in (FLOATS, INT16, BF16, INT8):
        check(lib, case, activations)
    check(lib, case._replace(hidden=72, ranks=33, latent=48, plain=7, value=5, bias=None))  # no whole blocks
    check(lib, case._replace(ranks=0, latent=320, heads=9))  # queries in one step, latents of two pieces


@pytest.mark.parametrize("rotation", [HALVES, NEIGHBOURS, APART])
@pytest.mark.parametrize("shared", [False, True])
def test_rotations(lib: Any, isa: str, rotation: int, shared: bool) -> None:
    for rotated in (16, 32, 64):
        for dtype in DTYPES:
            check(lib, Case(rotated=rotated, rotation=rotation, shared=shared, last=3, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1000, 256 * 16, 256 * 16 + 1, 256 * 40 + 7])
def test_any_number_of_positions(lib: Any, isa: str, length: int, dtype: torch.dtype) -> None:
    """Beyond 16 pieces several make one span."""
    for first, spare in ((0, 0), (13, 5), (300, 1)):
        case = Case(dtype=dtype, heads=2, first=first, last=first + length - 1, spare=spare)
        check(lib, case._replace(latent=16) if length > 1000 else case)


@pytest.mark.parametrize("heads", [1, 7, 8, 9, 20])
def test_any_number_of_heads(lib: Any, isa: str, heads: int) -> None:
    check(lib, Case(heads=heads, last=300))


def test_large_scores_do_not_overflow(lib: Any, isa: str) -> None:
    """In one piece, between pieces and between spans."""
    for last in (200, 600, 6000):
        call = Call(Case(last=last, latent=16))
        call.latents *= 1e3
        call.keys *= 1e3
        want, _, _ = call.reference()
        assert off(call.answer(lib), want) < 3e-3  # floats hold no more of scores that large


@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_the_number_of_threads_changes_no_bit(lib: Any, isa: str, format: str) -> None:
    case = Case(heads=20, latent=128, plain=128, value=128, hidden=576, format=format, last=5000)
    alone = Call(case)
    want = alone.answer(lib)
    for threads in (2, 3, 64, 1000):
        call = Call(case)
        assert torch.equal(call.answer(lib, threads=threads), want)
        for got, once in ((call.latents, alone.latents), (call.keys, alone.keys)):
            assert torch.equal(got.view(torch.int32), once.view(torch.int32))


@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
@pytest.mark.parametrize("activations", [FLOATS, INT16, BF16, INT8])
def test_several_tokens_together_are_as_each_alone(lib: Any, isa: str, format: str, activations: int) -> None:
    """Bit by bit for up to four, which never are multiplied in tiles."""
    case = Case(format=format, dtype=torch.bfloat16, hidden=128, ranks=64, latent=128, value=32)
    for count in (2, 4, 6):
        together = Together(case, SPANS[:count])
        want = [call.answer(lib, activations=activations) for call in together.calls]
        kept = together.forget()
        got = together.answer(lib, activations=activations)
        written = together.forget()
        if count <= 4 and isa != "portable":
            assert all(torch.equal(row, alone) for row, alone in zip(got, want, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(written, kept, strict=True))
        for row, alone in zip([*got, *written], [*want, *kept], strict=True):
            assert off(row, alone.double()) < 0.05


@pytest.mark.parametrize("format", FORMATS)
def test_a_number_that_is_none_spoils_all(lib: Any, isa: str, format: str) -> None:
    for last in (0, 300):
        for activations in (FLOATS, INT16, BF16, INT8):
            call = Call(Case(format=format, dtype=torch.bfloat16, last=last))
            call.x[5] = float("nan")
            assert call.answer(lib, activations=activations).isnan().all()
            assert call.latents[last].isnan().all()
            assert call.keys[last].isnan().all()


def test_an_earlier_number_that_is_none_spoils_the_answer(lib: Any, isa: str) -> None:
    for position in (0, 255, 256, 4999):
        for name, bad in (("latents", "nan"), ("latents", "inf"), ("keys", "nan")):
            call = Call(Case(last=5000, latent=16))
            assert torch.isfinite(call.answer(lib)).all()
            getattr(call, name)[position] = float(bad)
            assert not torch.isfinite(call.answer(lib)).any()


def test_bad_arguments_are_refused(lib: Any) -> None:
    call = Call(Case())
    assert call(lib) == 0
    for name in ("attention", "x", "cos", "sin", "sequences", "y"):
        assert call(lib, **{name: None}) == BAD_ARGUMENT, name
    for name, bad in (("tokens", 0), ("tokens", 257), ("threads", 0), ("activations", 9)):
        assert call(lib, **{name: bad}) == BAD_ARGUMENT, name
    wrong: dict[str, list[Any]] = {"heads": [0, 2, 4], "latent": [48, 0], "plain": [0, 23], "value": [0, 21]}
    wrong |= {"rotated": [0, 8, 32], "rotation": [-1, 3], "dtype": [3], "q_norm": [None], "kv_norm": [None]}
    for name, values in wrong.items():
        kept = getattr(call.struct, name)
        for value in values:
            setattr(call.struct, name, value)
            assert call(lib) == BAD_ARGUMENT, (name, value)
        setattr(call.struct, name, kept)
    for name, value in (("first", -1), ("last", -1), ("keys", None), ("values", None)):
        kept = getattr(call.sequence, name)
        setattr(call.sequence, name, value)
        assert call(lib) == BAD_ARGUMENT, name
        setattr(call.sequence, name, kept)
    for name in ("q_a", "q_b", "kv_a", "kv_b", "o"):
        for field, value in (("rows", 5), ("cols", 5), ("q", None)):
            matrix = getattr(call.struct, name)
            kept = getattr(matrix, field)
            setattr(matrix, field, value)
            assert call(lib) == BAD_ARGUMENT, (name, field)
            setattr(matrix, field, kept)
    call.struct.kv_b.bias = call.x.data_ptr()
    assert call(lib) == BAD_ARGUMENT
