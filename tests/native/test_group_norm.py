"""moe_open_and_norm against transformers' norm of Mamba-2, for every instruction set and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from moe_local.offload.native.library import DTYPES
from tests.native.test_norm_route import BAD_ARGUMENT, OK, OUTSIDE, Normed, gates_of, steps_apart, tokens_of

SHAPES = (1, 1), (7, 1), (3, 11), (4, 16), (8, 33), (1, 100), (8, 512)
"""Numbers of groups, and their widths."""

PAIRS = [(torch.float32, torch.float32)]
PAIRS += [(dtype, x) for dtype in DTYPES if dtype is not torch.float32 for x in (dtype, torch.float32)]
"""Dtypes of a layer, and of what its scan returns."""


def normed(
    lib: Any,
    x: torch.Tensor,
    gate: torch.Tensor,
    groups: int,
    epsilon: float = 1e-5,
    in_place: bool = False,
    threads: int = 2,
) -> Normed:
    """moe_open_and_norm of x [T, D] by a random weight, written between guards; and transformers' own."""
    tokens, width = x.shape
    norm = Zamba2RMSNormGated(width, width // groups, epsilon).to(gate.dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(width)))
        want = norm(x, gate)
    memory = torch.full((tokens * width + 32,), OUTSIDE, dtype=x.dtype)
    y = memory[16 : 16 + tokens * width].view(tokens, width)
    if in_place:
        y.copy_(x)
    pointers = (y if in_place else x).data_ptr(), gate.data_ptr(), norm.weight.data_ptr()
    rest = DTYPES[gate.dtype], DTYPES[x.dtype], y.data_ptr(), threads
    assert lib.moe_open_and_norm(*pointers, epsilon, tokens, groups, width, *rest) == OK
    assert (memory[:16] == OUTSIDE).all()
    assert (memory[-16:] == OUTSIDE).all()
    return Normed(y, want)


@pytest.mark.parametrize(("dtype", "of_x"), PAIRS)
@pytest.mark.parametrize("in_place", [False, True])
def test_norms_as_transformers_do(
    lib: Any, isa: str, dtype: torch.dtype, of_x: torch.dtype, in_place: bool
) -> None:
    """Of 16 bits, the quotient and the answer may each be rounded to the next number."""
    most = 12 if of_x is torch.float32 else 2
    for groups, width in SHAPES:
        for count in (1, 3):
            for size, epsilon in ((1e-4, 1e-6), (1.0, 1e-5), (100.0, 0.1)):
                x = tokens_of(count, groups * width, of_x, size)
                got, want = normed(lib, x, gates_of(x).to(dtype), groups, epsilon, in_place)
                assert got.dtype is want.dtype
                apart = steps_apart(got, want)
                assert apart <= most, (groups, width, count, size, epsilon, apart)
                few = 0.01 + 1 / (groups * width)
                assert of_x is torch.float32 or (got != want).float().mean() < few


@pytest.mark.parametrize(("dtype", "of_x"), PAIRS)
def test_gates_at_the_ends(lib: Any, isa: str, dtype: torch.dtype, of_x: torch.dtype) -> None:
    """Those that are shut leave nothing; a number that is none spoils its group and no other."""
    ends = [0.0, -0.0, 1e-7, 20, -20, 100, -100, 3e4, -3e4]
    gate = torch.tensor(ends).to(dtype).repeat_interleave(8)[None]
    x = tokens_of(1, 72, of_x)
    got, want = normed(lib, x, gate, 9)
    assert torch.allclose(got, want, rtol=4 * torch.finfo(of_x).eps, atol=1e-30)
    for bad, place in ((torch.nan, 3), (torch.inf, 70)):
        changed = gate.clone()
        changed[0, place] = bad
        spoilt, want = normed(lib, x, changed, 9)
        assert not spoilt[0, place].isfinite()
        assert torch.equal(spoilt.isfinite(), want.isfinite())
        others = [group for group in range(9) if group != place // 8]
        assert torch.equal(spoilt.view(9, 8)[others], got.view(9, 8)[others])


@pytest.mark.parametrize(("dtype", "of_x"), PAIRS)
@pytest.mark.parametrize(("tokens", "groups", "width"), [(3000, 4, 64), (333, 8, 1000), (20, 2, 20000)])
def test_threads_change_no_norm(
    lib: Any, isa: str, tokens: int, groups: int, width: int, dtype: torch.dtype, of_x: torch.dtype
) -> None:
    """Of more tokens than a chunk has; and each is as alone."""
    x = tokens_of(tokens, width, of_x)
    gate = gates_of(x).to(dtype)
    alone = normed(lib, x, gate, groups, threads=1).got
    for threads in (2, 3, 1000):
        assert torch.equal(normed(lib, x, gate, groups, threads=threads).got, alone)
    for t in (0, 1, tokens - 1):
        assert torch.equal(normed(lib, x[t : t + 1], gate[t : t + 1], groups).got[0], alone[t])


def test_wrong_norms_are_refused(lib: Any) -> None:
    x, weight, y = torch.ones(2, 8), torch.ones(8), torch.full((2, 8), OUTSIDE)
    good = [x.data_ptr(), x.data_ptr(), weight.data_ptr(), 1e-5, 2, 2, 8, 0, 0, y.data_ptr(), 1]
    wrong = [(0, None), (1, None), (2, None), (4, -1), (5, 0), (5, -2), (5, 3), (5, 16), (6, 0), (6, -8)]
    wrong += [(6, 2**62), (7, -1), (7, 3), (8, -1), (8, 1), (8, 2), (9, None), (10, 0)]
    for place, value in wrong:
        changed = [*good[:place], value, *good[place + 1 :]]
        assert lib.moe_open_and_norm(*changed) == BAD_ARGUMENT, (place, value)
        assert (y == OUTSIDE).all()
    assert lib.moe_open_and_norm(None, None, None, 1e-5, 0, 2, 8, 1, 0, None, 1) == OK
    assert lib.moe_open_and_norm(*good) == OK
    assert not (y == OUTSIDE).any()
