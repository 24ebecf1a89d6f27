"""The quantization of scales against bitsandbytes' own, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moe_local.offload.native.library import library
from moe_local.offload.quantize import nf4_scales
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.code_tables import dynamic_map
from moe_local.offload.quantize.nf4_scales import quantize_scales, steps


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    steps.cache_clear()


@pytest.fixture
def found() -> torch.Tensor:
    """bitsandbytes' steps."""
    if library() is None:
        pytest.skip("the library was not compiled")
    found = steps()
    assert found is not None, "bitsandbytes does not quantize by steps: slow, not wrong, and worth knowing"
    return found


def expected(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    code = dynamic_map(torch.device("cpu"))
    q, nested = bitsandbytes_ops().quantize_blockwise.default(numbers, code, 256)
    return q, nested


def quantized(absmax: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.full((absmax.numel(),), 0xAA, dtype=torch.uint8)
    nested = torch.full((-(-absmax.numel() // 256),), -7.0)
    quantize_scales(absmax, offset, q, nested)
    return q, nested


def same(absmax: torch.Tensor, offset: torch.Tensor) -> bool:
    ours, theirs = quantized(absmax, offset), expected(absmax - offset)
    return torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_steps_are_those_of_a_sorted_map(found: torch.Tensor) -> None:
    """Each lies between the map's values on both sides of it, as far as bitsandbytes tells them apart."""
    values = dynamic_map(torch.device("cpu"))
    assert torch.equal(found, found.sort().values)
    seen = found.isfinite() & (torch.cat([found.diff().ne(0), torch.tensor([True])]))
    assert seen.sum() > 200
    between = (values[:-1] - 1e-4 <= found) & (found <= values[1:] + 1e-4)
    assert between[seen].all()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_all_sizes(threads: int) -> None:
    torch.set_num_threads(threads)
    for numel in [*range(1, 20), *range(250, 262), 511, 512, 513, 70_001, 1_000_000]:
        generator = torch.Generator().manual_seed(numel)
        absmax = torch.rand(numel, generator=generator) * 0.02 + 0.03
        assert same(absmax, absmax.mean()), numel


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_all_magnitudes(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    absmax = torch.randn(100, 256, generator=generator).abs().pow(4).mul(scale)
    absmax[3] = absmax.mean()  # a block of zeros, or nearly
    absmax[5, 7:] = 0
    assert same(absmax.view(-1), absmax.mean())
    assert same(absmax.view(-1), torch.tensor(0.0))


def test_numbers_on_and_beside_the_steps(found: torch.Tensor) -> None:
    finite = found[found.isfinite()]
    low, high = (torch.nextafter(finite, torch.tensor(to)) for to in (-2.0, 2.0))
    for numbers in (finite, low, high.clamp(max=1.0), torch.linspace(-0.01, 0.01, 255)):
        for sign in (1.0, -1.0):
            block = torch.full((256,), sign)
            block[1 : len(numbers) + 1] = numbers
            assert same(block, torch.tensor(0.0))
            assert same(torch.cat([block * 0.37, block * 3e-5]), torch.tensor(0.0))


def test_all_equal() -> None:
    absmax = torch.full((1000,), 0.1)
    assert same(absmax, absmax[0])
    assert same(absmax, absmax.mean())


def test_a_block_too_small_to_divide_by_does_no_harm() -> None:
    """Its inverse is infinite, and 0 times that is not a number."""
    absmax = torch.full((300,), 1e-42)
    absmax[::3] = 0
    _, nested = quantized(absmax, torch.tensor(0.0))
    assert torch.equal(nested, absmax[:2].amax().expand(2))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_scales, "library", lambda: None)
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert same(absmax, absmax.mean())


@pytest.mark.parametrize("quirk", ["rises and falls", "by blocks", "other scales"])
def test_a_bitsandbytes_without_steps_is_used_itself(
    found: torch.Tensor, monkeypatch: pytest.MonkeyPatch, quirk: str
) -> None:
    plain = nf4_scales._ask

    def ask(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, nested = plain(numbers)
        if quirk == "rises and falls":
            return torch.where(q > 200, 400 - q.int(), q).to(torch.uint8), nested
        if quirk == "by blocks":
            return torch.where(torch.arange(q.numel()) >= 256, q // 2, q), nested
        return q, nested * 2

    steps.cache_clear()
    monkeypatch.setattr(nf4_scales, "_ask", ask)
    assert steps() is None
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    ours, theirs = quantized(absmax, absmax.mean()), ask(absmax - absmax.mean())
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_bad_arguments_are_refused(found: torch.Tensor) -> None:
    compiled = library()
    assert compiled is not None
    absmax, q, nested = torch.ones(10), torch.full((10,), 9, dtype=torch.uint8), torch.ones(1)
    at = absmax.data_ptr(), found.data_ptr(), q.data_ptr(), nested.data_ptr()
    falling = found.flip(0).clone().data_ptr()
    for arguments in (
        (at[0], -1, 0.0, *at[1:], 1),
        (at[0], 10, 0.0, *at[1:], 0),
        (at[0], 10, float("nan"), *at[1:], 1),
        (at[0], 10, float("inf"), *at[1:], 1),
        (at[0], 10, 0.0, falling, *at[2:], 1),
        (None, 10, 0.0, *at[1:], 1),
        (at[0], 10, 0.0, None, *at[2:], 1),
        (at[0], 10, 0.0, at[1], None, at[3], 1),
        (at[0], 10, 0.0, at[1], at[2], None, 1),
    ):
        assert compiled.moe_scales_encode(*arguments) == 1
    assert compiled.moe_scales_encode(None, 0, 0.0, None, None, None, 1) == 0
    assert q.eq(9).all()
