"""moe_mamba2 against float64, for every instruction set, dtype and format."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from moe_local.offload.native.library import (
    BAD_ARGUMENT,
    BF16,
    DTYPES,
    FLOATS,
    FORMATS,
    INT8,
    INT16,
    Mamba2,
)
from support import packed
from support.attention_calls import OUTSIDE, AnyCall, matrix_of
from support.packed import UNLIKE, off
from support.variants import others_slow

EPSILON = 1e-5
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative error, in the Frobenius norm: half the steps between are rounded to the dtype."""
ROUNDED = {FLOATS: 0.0, INT16: 5e-4, BF16: 5e-4, INT8: 0.1}
"""What the activations' rounding adds to it."""
VECTORS = ("convolution", "convolution_bias", "a_log", "d", "dt_bias", "norm")


class Case(NamedTuple):
    heads: int = 4
    groups: int = 2
    width: int = 24
    states: int = 32
    taps: int = 4
    hidden: int = 64
    rows: int = 1
    bias: torch.dtype | None = None
    """Of the matrices."""
    convolution_bias: bool = True
    format: str = "fp32"
    dtype: torch.dtype = torch.float32

    @property
    def answers(self) -> int:
        return self.heads * self.width

    @property
    def channels(self) -> int:
        return self.answers + 2 * self.groups * self.states


class Call(AnyCall):
    """A call for one token of each of some rows, of random numbers."""

    function = "moe_mamba2"

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        shapes = {
            "in": (case.answers + case.channels + case.heads, case.hidden),
            "out": (case.hidden, case.answers),
        }
        options: dict[str, Any] = {"bias": case.bias is not None, "bias_dtype": case.bias or torch.float32}
        self.matrices = {
            name: matrix_of(case.format, *shape, seed=seed + place, **options)
            for place, (name, shape) in enumerate(shapes.items())
        }
        size = float(self.matrices["in"].weights.std()) * case.hidden**0.5  # so that products are about one
        self.x = packed.at_odd_address((random(case.rows, case.hidden).float() / size).to(case.dtype), 1)
        self.x = self.x.view(case.rows, case.hidden)
        self.inputs = random(case.rows, case.channels, case.taps)
        self.states = random(case.rows, case.heads, case.width, case.states, dtype=torch.float32)
        self.convolution, self.convolution_bias = (
            random(case.channels, case.taps),
            random(case.channels),
        )
        self.a_log, self.d, self.dt_bias = (random(case.heads) for _ in range(3))
        self.norm = random(case.answers)
        self.y = torch.full((case.rows * case.hidden + 32,), OUTSIDE, dtype=case.dtype)
        self.struct = struct = Mamba2(**{name: matrix.struct for name, matrix in self.matrices.items()})
        for name in ("heads", "groups", "width", "states", "taps"):
            setattr(struct, name, getattr(case, name))
        for name in VECTORS:
            setattr(struct, name, getattr(self, name).data_ptr())
        if not case.convolution_bias:
            struct.convolution_bias = None
        struct.epsilon, struct.dtype = EPSILON, DTYPES[case.dtype]
        self.arguments: dict[str, Any] = {
            "layer": ctypes.byref(struct),
            "x": self.x.data_ptr(),
            "inputs": self.inputs.data_ptr(),
            "states": self.states.data_ptr(),
            "rows": case.rows,
            "y": self.y[16:].data_ptr(),
            "activations": FLOATS,
            "threads": 1,
        }

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y [rows, D] and the new inputs and states, as transformers has them, but in float64."""
        case = self.case
        keys = case.groups * case.states
        z, mixed, dt = (
            self.matrices["in"].product(self.x.double()).split([case.answers, case.channels, case.heads], -1)
        )
        inputs = torch.cat([self.inputs[..., 1:].double(), mixed[..., None]], -1)
        sums = (inputs * self.convolution.double()).sum(-1)
        sums = F.silu(sums + (self.convolution_bias.double() if case.convolution_bias else 0))
        x, b, c = sums.split([case.answers, keys, keys], -1)
        x = x.view(case.rows, case.heads, case.width)
        b, c = (
            part.view(case.rows, case.groups, 1, -1).repeat_interleave(case.heads // case.groups, 1)
            for part in (b, c)
        )
        dt = F.softplus(dt + self.dt_bias.double())
        factor = (-self.a_log.double().exp() * dt).exp()
        states = factor[..., None, None] * self.states.double() + (dt[..., None] * x)[..., None] * b
        answers = (states * c).sum(-1) + self.d.double()[:, None] * x
        answers = (answers.flatten(1) * F.silu(z)).view(case.rows, case.groups, -1)
        answers = answers * (answers.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        return self.matrices["out"].product(answers.flatten(1) * self.norm.double()), inputs, states


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
    check(lib, case._replace(hidden=72, width=9, states=16, bias=None))  # no whole blocks of 64
    check(lib, case._replace(rows=3, heads=6, groups=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(lib: Any, isa: str, dtype: torch.dtype) -> None:
    for heads, groups in ((1, 1), (3, 3), (8, 2)):
        for taps in (1, 2, 4, 5):
            check(lib, Case(heads, groups, taps=taps, dtype=dtype, convolution_bias=taps == 4, rows=2))
    check(lib, Case(16, 2, 64, 128, hidden=128, dtype=dtype))  # channels of several chunks
    check(lib, Case(5, 1, 131, 80, hidden=128, dtype=dtype))


@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_the_number_of_threads_changes_no_bit(lib: Any, isa: str, format: str) -> None:
    case = Case(8, 2, 64, 128, hidden=256, format=format, rows=2)
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
            for name in VECTORS:
                getattr(alone, name).copy_(getattr(together, name))
            want = alone.answer(lib, activations=activations)[0], alone.inputs[0], alone.states[0]
            found = got[row], together.inputs[row], together.states[row]
            if count <= 4 and isa != "portable":
                assert all(map(torch.equal, found, want))
            assert all(off(a, b.double()) < 0.05 for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_spoils_its_row_and_no_other(lib: Any, isa: str, dtype: torch.dtype) -> None:
    call = Call(Case(rows=2, dtype=dtype))
    call.x[1, 5] = float("nan")
    y = call.answer(lib)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert call.states[0].isfinite().all()
    assert call.states[1].isnan().all()


def test_bad_arguments_are_refused(lib: Any) -> None:
    call = Call(Case())
    assert call(lib) == 0
    for name in ("layer", "x", "inputs", "states", "y"):
        assert call(lib, **{name: None}) == BAD_ARGUMENT, name
    for name, bad in (("rows", 0), ("rows", 257), ("threads", 0), ("activations", 9)):
        assert call(lib, **{name: bad}) == BAD_ARGUMENT, name
    wrong: dict[str, list[Any]] = {"heads": [0, 3], "groups": [0, 3], "width": [0, 23], "taps": [0]}
    wrong |= {"states": [0, 24, 48], "dtype": [3]}
    wrong |= {name: [None] for name in VECTORS if name != "convolution_bias"}
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
