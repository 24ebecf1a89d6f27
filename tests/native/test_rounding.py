"""Activations that are hard to round: outliers, numbers that are none, the smallest, the largest."""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import pytest
import torch

from moe_local.offload.native.library import BF16, FLOATS, INT8, INT16
from support import packed

WAYS = (FLOATS, INT16, INT8, BF16)
COLS = 4096


def with_outliers(tokens: int, cols: int, channels: int, size: float) -> torch.Tensor:
    """Normal activations, `channels` of them `size` times as large in every token, as in language models."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(tokens, cols, generator=generator)
    x[:, torch.randperm(cols, generator=generator)[:channels]] *= size
    return x


def off_by_token(got: torch.Tensor, want: torch.Tensor) -> float:
    """The worst token's relative error."""
    return float(((got.double() - want).norm(dim=1) / want.norm(dim=1)).max())


@functools.cache
def wide(format: str) -> Any:
    """A matrix; made once for all instruction sets."""
    return packed.pack(format, 256, COLS, bias=False)


@pytest.mark.parametrize("format", ["nf4", "int8", "q3", "q2"])
@pytest.mark.parametrize("channels", [1, 4, 16])
def test_outliers_leave_results_right(isa: str, format: str, channels: int) -> None:
    """Eight bits lose an outlier's neighbours, which are at most 63 and small beside it."""
    m = wide(format)
    x = with_outliers(4, COLS, channels, 1000.0)
    want = m.product(x)
    for activations, bound in ((FLOATS, 2e-6), (INT16, 1.2e-4), (INT8, 2.2e-2)):
        assert off_by_token(packed.linear(m, x, activations), want) < bound


@pytest.mark.parametrize("format", ["nf4", "int8"])  # all blocks of about one size
def test_outliers_blur_their_own_block_only(isa: str, format: str) -> None:
    """What the other channels contribute: unharmed but for those that share a scale with an outlier."""
    channels = 4
    m = wide(format)
    x = with_outliers(4, COLS, channels, 1000.0)
    large = x[0].abs() > 20
    outliers, others = x * large, x * ~large
    blocks = int(large.view(-1, 64).any(dim=1).sum())
    lost = (blocks * 64 / COLS) ** 0.5  # if all of these blocks' other channels come to nothing
    # Sixteen bits: what the outliers' own weights are off by, as whole numbers.
    for activations, bound in ((INT16, 8e-3), (INT8, 1.2 * lost)):
        theirs = packed.linear(m, x, activations).double() - m.product(outliers)
        assert off_by_token(theirs, m.product(others)) < bound
    clear = m.weights.view(-1, COLS // 64, 64) * ~large.view(-1, 64).any(dim=1)[:, None]
    quiet = x * ~large.view(-1, 64).any(dim=1).repeat_interleave(64)
    alone = packed.linear(m, quiet, INT8)
    assert off_by_token(alone, quiet.double() @ clear.flatten(1).T) < 1e-2


@pytest.mark.parametrize("activations", WAYS)
@pytest.mark.parametrize("format", ["nf4", "int8", "q3", "q2"])
@pytest.mark.parametrize("cols", [256, 250])
def test_a_number_that_is_none_spoils_its_token_and_no_other(
    isa: str, format: str, activations: int, cols: int
) -> None:
    m = packed.pack(format, 40, cols)
    for bad, tokens in product((float("nan"), float("inf"), -float("inf")), (2, 4, 5, 33)):
        x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))
        clean = packed.linear(m, x, activations)
        spoilt = x.clone()
        spoilt[1, 100] = bad
        got = packed.linear(m, spoilt, activations)
        assert not torch.isfinite(got[1]).any()
        if bad != bad:
            assert got[1].isnan().all()
        others = [t for t in range(tokens) if t != 1]
        assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("activations", WAYS)
@pytest.mark.parametrize("format", ["nf4", "int8", "q3", "q2"])
def test_zeros_give_the_bias(isa: str, format: str, activations: int) -> None:
    for cols in (64, 100, 1024):
        m = packed.pack(format, 33, cols)
        for tokens in (1, 5):
            got = packed.linear(m, torch.zeros(tokens, cols), activations)
            assert torch.equal(got, m.bias.float().expand(tokens, -1))


@pytest.mark.parametrize("activations", WAYS)
@pytest.mark.parametrize("format", ["nf4", "int8", "q3", "q2"])
def test_any_size_is_right_or_too_small_to_matter(isa: str, format: str, activations: int) -> None:
    m = packed.pack(format, 20, 192, bias=False)
    sizes = (1e-45, 1e-40, 2e-38, 1e-37, 3e-37, 4e-37, 1e-36, 9e-35, 1e-34, 1e-30, 1e30)
    for size, tokens in product(sizes, (1, 5)):
        x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(tokens)) * size
        got = packed.linear(m, x, activations)
        want = m.product(x)
        allowed = 1.5e-2 * float(want.norm()) + 4e-34 * float(m.weights.abs().sum())
        assert float((got.double() - want).norm()) < allowed
        if activations == FLOATS and size >= 1e-37:
            assert off_by_token(got, want) < 1e-5


@pytest.mark.parametrize("activations", WAYS)
def test_a_block_of_zeros_beside_others(isa: str, activations: int) -> None:
    m = packed.pack("nf4", 20, 256, bias=False)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    x[:, 64:128] = 0
    x[1] = 0
    got = packed.linear(m, x, activations)
    assert torch.equal(got[1], torch.zeros(20))
    assert off_by_token(got[[0, 2]], m.product(x[[0, 2]])) < 2e-2
