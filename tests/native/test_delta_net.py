"""moe_delta_net against float64, for every instruction set, dtype and format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_local.offload.native.library import (
    BAD_ARGUMENT,
    BF16,
    DTYPES,
    FLOATS,
    FORMATS,
    INT8,
    INT16,
)
from support.delta_net_calls import Call, Case
from support.packed import UNLIKE, off
from support.variants import others_slow

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative error, in the Frobenius norm: half the steps between are rounded to the dtype."""

ROUNDED = {FLOATS: 0.0, INT16: 5e-4, BF16: 5e-4, INT8: 0.1}
"""What the activations' rounding adds to it."""


def check(lib: Any, case: Case, activations: int = FLOATS, threads: int = 1) -> None:
    call = Call(case)
    want = call.reference()
    found = call.answer(lib, activations=activations, threads=threads), call.inputs, call.states
    for got, exact in zip(found, want, strict=True):
        assert off(got, exact) < BOUNDS[case.dtype] + ROUNDED[activations], case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_exact_answer(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    case = Case(format=format, dtype=dtype, bias=torch.float32)
    for activations in (FLOATS, INT16, BF16, INT8):
        check(lib, case, activations)
    check(lib, case._replace(hidden=72, key_width=7, value_width=16, bias=None))  # no whole blocks of 64
    check(lib, case._replace(rows=3, value_heads=6, key_heads=3))
    check(lib, case._replace(rows=2, value_heads=6, by_key_head=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(lib: Any, isa: str, dtype: torch.dtype) -> None:
    for heads in ((1, 1), (3, 3), (2, 8)):
        for taps in (1, 2, 4, 5):
            case = Case(*heads, taps=taps, dtype=dtype, convolution_bias=taps == 4, rows=2)
            check(lib, case)
            check(lib, case._replace(by_key_head=True))
    for by_key_head in (False, True):  # channels of several chunks, whose ends lie within heads or between
        check(lib, Case(16, 32, 128, 128, hidden=128, dtype=dtype, by_key_head=by_key_head))
        check(lib, Case(3, 6, 100, 144, hidden=128, dtype=dtype, by_key_head=by_key_head))


@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_the_number_of_threads_changes_no_bit(lib: Any, isa: str, format: str) -> None:
    for by_key_head in (False, True):
        case = Case(4, 8, 128, 128, hidden=256, format=format, rows=2, by_key_head=by_key_head)
        alone = Call(case)
        want = alone.answer(lib)
        for threads in (2, 3, 64, 1000):
            call = Call(case)
            assert torch.equal(call.answer(lib, threads=threads), want)
            assert torch.equal(call.inputs, alone.inputs)
            assert torch.equal(call.states, alone.states)


@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
@pytest.mark.parametrize("activations", [FLOATS, INT16, BF16, INT8])
def test_several_rows_are_as_each_alone(lib: Any, isa: str, format: str, activations: int) -> None:
    """Bit by bit for up to four, which never are multiplied in tiles."""
    case = Case(format=format, dtype=torch.bfloat16, hidden=128)
    for count in (2, 4, 6):
        together = Call(case._replace(rows=count))
        before = together.inputs.clone(), together.states.clone()
        got = together.answer(lib, activations=activations)
        for row in range(count):
            alone = Call(case)
            alone.x.copy_(together.x[row : row + 1])
            alone.inputs.copy_(before[0][row : row + 1])
            alone.states.copy_(before[1][row : row + 1])
            for name in ("convolution", "convolution_bias", "a_log", "dt_bias", "norm"):
                getattr(alone, name).copy_(getattr(together, name))
            want = alone.answer(lib, activations=activations)[0], alone.inputs[0], alone.states[0]
            found = got[row], together.inputs[row], together.states[row]
            if count <= 4 and isa != "portable":
                assert all(map(torch.equal, found, want))
            assert all(off(a, b.double()) < 0.05 for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_that_change_later_become_the_same(lib: Any, isa: str, dtype: torch.dtype) -> None:
    cases = [Case(dtype=dtype), Case(2, 6, 7, 16, dtype=dtype, rows=3, by_key_head=True)]
    cases += [Case(4, 8, 128, 144, taps=1, dtype=dtype, rows=2)]  # channels of several chunks
    for case in cases:
        at_once, later = Call(case), Call(case)
        before = later.inputs.clone(), later.states.clone()
        changes = torch.full((case.rows * later.left() + 32,), 77.0)
        left = changes[16:-16]
        for threads in (1, 3):
            assert torch.equal(
                later.answer(lib, changes=left.data_ptr(), threads=threads), at_once.answer(lib)
            )
            assert torch.equal(later.inputs, before[0])
            assert torch.equal(later.states, before[1])
            assert later.change(lib, left, threads=threads) == 0
            assert torch.equal(later.inputs, at_once.inputs)
            assert torch.equal(later.states, at_once.states)
            assert (changes[:16] == 77).all()
            assert (changes[-16:] == 77).all()
            assert (left != 77).all()
            before = later.inputs.clone(), later.states.clone()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_spoils_its_row_and_no_other(lib: Any, isa: str, dtype: torch.dtype) -> None:
    call = Call(Case(rows=2, dtype=dtype))
    call.x[1, 5] = float("nan")
    y = call.answer(lib)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert call.states[0].isfinite().all()
    assert call.states[1].isnan().all()


def test_bad_arguments_of_later_changes_are_refused(lib: Any) -> None:
    call = Call(Case())
    changes = torch.zeros(call.left())
    assert call.change(lib, changes) == 0
    for name in ("net", "changes", "inputs", "states"):
        assert call.change(lib, changes, **{name: None}) == BAD_ARGUMENT, name
    for name, bad in (("rows", 0), ("rows", 257), ("threads", 0)):
        assert call.change(lib, changes, **{name: bad}) == BAD_ARGUMENT, name
    call.struct.value_width = 24
    assert call.change(lib, changes) == BAD_ARGUMENT


@pytest.mark.parametrize("by_key_head", [False, True])
def test_bad_arguments_are_refused(lib: Any, by_key_head: bool) -> None:
    call = Call(Case(by_key_head=by_key_head))
    assert call(lib) == 0
    for name in ("net", "x", "inputs", "states", "y"):
        assert call(lib, **{name: None}) == BAD_ARGUMENT, name
    for name, bad in (("rows", 0), ("rows", 257), ("threads", 0), ("activations", 9)):
        assert call(lib, **{name: bad}) == BAD_ARGUMENT, name
    wrong: dict[str, list[Any]] = {"key_heads": [0, 3], "value_heads": [0, 2], "key_width": [0, 23]}
    wrong |= {"value_width": [0, 24, 48], "taps": [0], "dtype": [3]}
    wrong["by_key_head"] = [1 - by_key_head]
    wrong |= {name: [None] for name in ("convolution", "a_log", "dt_bias", "norm")}
    for name, values in wrong.items():
        kept = getattr(call.struct, name)
        for value in values:
            setattr(call.struct, name, value)
            assert call(lib) == BAD_ARGUMENT, (name, value)
        setattr(call.struct, name, kept)
    for name in call.matrices:
        for field, value in (("rows", 5), ("cols", 5), ("q", None)):
            matrix = getattr(call.struct, name)
            kept = getattr(matrix, field)
            setattr(matrix, field, value)
            assert call(lib) == BAD_ARGUMENT, (name, field)
            setattr(matrix, field, kept)
