"""moe_mlp against float64, for every instruction set, dtype and format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_local.offload.native.library import BAD_ARGUMENT, BF16, DTYPES, FLOATS, FORMATS, INT8, INT16
from support.attention_calls import OUTSIDE
from support.mlp_calls import (
    CLAMPED_SILU,
    CLAMPED_SWIGLU,
    GELU,
    GELU_TANH,
    IDENTITY,
    RELU,
    RELU2,
    SILU,
    Call,
    Case,
)
from support.packed import off

BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
"""Largest relative error, in the Frobenius norm: only the output and a share are rounded to the dtype."""

ROUNDED = {FLOATS: 0.0, INT16: 4e-4, BF16: 4e-4, INT8: 0.06}
"""What the activations' rounding adds to it, for tokens that are not multiplied in tiles."""


def check(lib: Any, case: Case, activations: int = FLOATS) -> None:
    call = Call(case)
    y = call.answer(lib, activations=activations)
    assert off(y, call.reference()) < BOUNDS[case.dtype] + ROUNDED[activations], (case, activations)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_exact_answer(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    for share in (False, True):
        case = Case(format=format, dtype=dtype, share=share)
        for activations in ROUNDED:
            check(lib, case, activations)
        check(lib, case._replace(width=72, hidden=33, bias=None))  # no whole blocks of 64
        check(lib, case._replace(width=33, hidden=200, bias=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [IDENTITY, RELU, RELU2, SILU, GELU, GELU_TANH])
def test_functions(lib: Any, isa: str, function: int, dtype: torch.dtype) -> None:
    for hidden in (1, 15, 64, 100):
        check(lib, Case(function=function, dtype=dtype, hidden=hidden))


@pytest.mark.parametrize("share", [False, True])
def test_matrices_of_several_formats(lib: Any, isa: str, share: bool) -> None:
    """Each has inputs that are prepared for it."""
    for format, down, opens in (("nf4", "q3", "bf16"), ("fp32", "int8", "nf4"), ("q2", "fp8", "mxfp4")):
        case = Case(format=format, of_down=down, of_share=opens, share=share, width=128, hidden=192)
        for activations in ROUNDED:
            check(lib, case, activations)


@pytest.mark.parametrize("format", FORMATS)
def test_many_tokens(lib: Any, isa: str, format: str) -> None:
    """More than four are multiplied in tiles, where there are any."""
    for tokens in (5, 40, 256):
        for activations, bound in ((FLOATS, 5e-6), (INT16, 4e-4), (BF16, 2e-2), (INT8, 0.06)):
            call = Call(Case(format=format, tokens=tokens, width=128, hidden=192, share=True))
            want = call.reference()
            y = call.answer(lib, activations=activations)
            assert off(y, want) < bound, (tokens, activations)
            assert torch.equal(call.answer(lib, activations=activations, threads=3), y)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activations", [FLOATS, INT16, BF16, INT8])
def test_several_tokens_together_are_as_each_alone(lib: Any, isa: str, format: str, activations: int) -> None:
    """Bit by bit for up to four, which never are multiplied in tiles."""
    for dtype in DTYPES:
        case = Case(format=format, dtype=dtype, share=True, width=128, hidden=192)
        for count in (2, 4, 6):
            together, alone = Call(case._replace(tokens=count)), Call(case)
            got = together.answer(lib, activations=activations)
            for token, row in zip(together.x, got, strict=True):
                alone.x.copy_(token)
                want = alone.answer(lib, activations=activations)[0]
                if count <= 4 and isa != "portable":
                    assert torch.equal(row, want)
                assert off(row, want.double()) < 0.05


@pytest.mark.parametrize("format", FORMATS)
def test_the_number_of_threads_changes_no_bit(lib: Any, isa: str, format: str) -> None:
    for share in (False, True):
        call = Call(Case(format=format, width=512, hidden=1024, tokens=2, share=share))
        want = call.answer(lib)
        for threads in (2, 3, 64, 1000):
            assert torch.equal(call.answer(lib, threads=threads), want)


def test_a_share_is_rounded_as_separate_operations_would_round_it(lib: Any, isa: str) -> None:
    for dtype in DTYPES:
        for opened in (0.3, 4.4, -7.33, -40.0):  # the third shows also whether it is rounded itself
            call = Call(Case(dtype=dtype, tokens=2, share=True))
            nothing, bias = torch.zeros(call.case.width), torch.tensor([opened])
            call.share.q, call.share.bias = nothing.data_ptr(), bias.data_ptr()
            want = call.answer(lib, share=None) * bias.to(dtype).sigmoid()
            alike = 2e-7 if dtype is torch.float32 else 0.0  # torch's sigmoid may have another last bit
            assert torch.allclose(call.answer(lib), want, rtol=alike, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_spoils_its_token_and_no_other(lib: Any, isa: str, dtype: torch.dtype) -> None:
    call = Call(Case(dtype=dtype, tokens=3, share=True))
    call.x[1, 5] = float("nan")
    y = call.answer(lib)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


MLP_WRONG: dict[str, Callable[[Call], dict[str, Any] | None]] = {
    **{f"no {name}": lambda _, name=name: {name: None} for name in ("mlp", "x", "y")},
    **{
        f"{name} without {part}": lambda call, name=name, part=part: setattr(
            getattr(call.struct, name), part, None
        )
        for name in ("gate", "up", "down")
        for part in ("q", "scales")
    },
    **{
        f"{name} of other {size}": lambda call, name=name, size=size: setattr(
            getattr(call.struct, name), size, 32
        )
        for name in ("gate", "up", "down")
        for size in ("rows", "cols")
    },
    "no columns": lambda call: setattr(call.struct.gate, "cols", 0),
    "too many rows": lambda call: setattr(call.struct.gate, "rows", 2**62),
    "gate and up of two formats": lambda call: setattr(call.struct, "up", of_format(call, "up", "int8")),
    "a function that is clamped": lambda call: setattr(call.struct, "function", CLAMPED_SWIGLU),
    "another that is clamped": lambda call: setattr(call.struct, "function", CLAMPED_SILU),
    "a function above": lambda call: setattr(call.struct, "function", CLAMPED_SILU + 1),
    "a function below": lambda call: setattr(call.struct, "function", -1),
    "a dtype above": lambda call: setattr(call.struct, "dtype", 3),
    "a dtype below": lambda call: setattr(call.struct, "dtype", -1),
    "no tokens": lambda _: {"tokens": 0},
    "fewer than no tokens": lambda _: {"tokens": -1},
    "too many tokens": lambda _: {"tokens": 257},
    "no threads": lambda _: {"threads": 0},
    "activations above": lambda _: {"activations": 4},
    "activations below": lambda _: {"activations": -1},
    "a share of another width": lambda call: setattr(call.share, "cols", 32),
    "a share of two rows": lambda call: setattr(call.share, "rows", 2),
    "a share of no rows": lambda call: setattr(call.share, "rows", 0),
    "a share without numbers": lambda call: setattr(call.share, "q", None),
}


def of_format(call: Call, name: str, format: str) -> Any:
    """A matrix that would do in all but its format."""
    return getattr(Call(call.case._replace(format=format)).struct, name)


@pytest.mark.parametrize("wrong", MLP_WRONG)
def test_wrong_calls_are_refused(lib: Any, wrong: str) -> None:
    call = Call(Case(format="nf4", share=True))
    assert call(lib) == 0
    call.y.fill_(OUTSIDE)
    assert call(lib, **(MLP_WRONG[wrong](call) or {})) == BAD_ARGUMENT
    assert (call.y == OUTSIDE).all()


def test_a_share_is_as_precise_as_floats(lib: Any) -> None:
    """Activations of 8 bits are the shared expert's, not its gate's."""
    call = Call(Case(format="nf4", of_share="fp32", share=True, width=128, hidden=192))
    call.x[:, ::64] *= 30
    plain, coarse = (call.answer(lib, share=None, activations=a) for a in (FLOATS, INT8))
    opened = call.answer(lib) / plain
    assert torch.allclose(call.answer(lib, activations=INT8), opened * coarse, rtol=1e-4, atol=1e-6)
