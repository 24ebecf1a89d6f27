"""Every way to quantize NF4 blocks, by the library's instruction sets and by torch, against bitsandbytes."""

from __future__ import annotations

import ctypes
import functools
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.offload.native.library import DTYPES, ISAS, library
from moe_local.offload.quantize import nf4_blocks
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.layout import TensorSpec
from moe_local.offload.quantize.nf4 import NF4Codec

Parts = tuple[torch.Tensor, torch.Tensor]
Quantize = Callable[[torch.Tensor], Parts]

WAYS = (*ISAS, "torch", "torch at large")


def expected(weights: torch.Tensor) -> Parts:
    q, absmax = bitsandbytes_ops().quantize_4bit.default(weights, 64, "nf4", torch.uint8)
    return q.view(-1), absmax


def empty_parts(weights: torch.Tensor) -> Parts:
    n = weights.numel()
    return torch.full((-(-n // 2),), 0xAA, dtype=torch.uint8), torch.full((-(-n // 64),), -7.0)


def same(ours: Parts, theirs: Parts) -> bool:
    """Bit-equal, where any NaN is like any other."""
    scales = [torch.where(absmax.isnan(), -1.0, absmax).view(torch.int32) for _, absmax in (ours, theirs)]
    return torch.equal(ours[0], theirs[0]) and torch.equal(*scales)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def on_isa() -> Iterator[Callable[[str], None]]:
    """on_isa(name) makes the library use that instruction set until the end of the test, or skips it."""
    compiled = library()
    before = None if compiled is None else compiled.moe_isa()

    def use(name: str) -> None:
        if compiled is None or compiled.moe_set_isa(ISAS.index(name)) != 0:
            pytest.skip(f"no {name} here")

    yield use
    if compiled is not None:
        compiled.moe_set_isa(before)


@pytest.fixture(params=WAYS)
def quantize(request: pytest.FixtureRequest, on_isa: Callable[[str], None]) -> Quantize:
    """Each implementation, as a function of weights."""
    way = {"torch": nf4_blocks.quantize_blocks_in_torch, "torch at large": at_large}.get(request.param)
    if way is None:
        on_isa(request.param)
        way = nf4_blocks.quantize_blocks

    def quantize(weights: torch.Tensor) -> Parts:
        parts = empty_parts(weights)
        way(weights, *parts)
        return parts

    return quantize


def at_large(weights: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> None:
    """As a GPU does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4_blocks, "_whole_blocks_in_threads", nf4_blocks.whole_blocks_at_large)
        nf4_blocks.quantize_blocks_in_torch(weights, q, absmax)


def draw_weights(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers of a random scale; zeros of both signs, subnormal, huge and equal ones among them."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    weights = torch.randn(numel, generator=generator) * 10.0 ** float(
        torch.randint(-6, 3, (), generator=generator)
    )
    kind = torch.randint(0, 60, (numel,), generator=generator)
    for number, special in enumerate((0.0, -0.0, info.smallest_normal / 4, info.max, -info.max, 1.0, -1.0)):
        weights[kind == number] = special
    return weights.to(dtype)


@functools.cache
def of_all_sizes(dtype: torch.dtype) -> list[tuple[torch.Tensor, Parts]]:
    """Weights and what is to come out; once for all ways."""
    sizes = [*range(1, 261), 4096 + 63, 70_001]
    drawn = [draw_weights(numel, dtype, numel) for numel in sizes]
    return [(weights, expected(weights)) for weights in drawn]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_all_sizes(quantize: Quantize, dtype: torch.dtype) -> None:
    for weights, wanted in of_all_sizes(dtype):
        assert same(quantize(weights), wanted), weights.numel()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_nothing_is_nothing(quantize: Quantize, dtype: torch.dtype) -> None:
    q, absmax = quantize(torch.empty(0, dtype=dtype))
    assert q.numel() == absmax.numel() == 0


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("value", [0.0, -0.0, "tiny", "smallest", "max", -1.0])
def test_blocks_of_one_number(quantize: Quantize, dtype: torch.dtype, value: float | str) -> None:
    info = torch.finfo(dtype)
    number = {"tiny": info.tiny, "smallest": info.smallest_normal / 8, "max": info.max}.get(value, value)
    weights = torch.full((64 * 3 + 7,), number, dtype=dtype)
    assert same(quantize(weights), expected(weights))


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_on_and_beside_the_bounds(quantize: Quantize, sign: int) -> None:
    """Every midpoint between two levels and its two neighbours in float32, in blocks of many scales."""
    bounds = torch.tensor(nf4_blocks._bounds())
    assert bounds.double().tolist() == list(nf4_blocks._bounds())  # float32 numbers exactly
    low, high = (torch.nextafter(bounds, torch.tensor(to)) for to in (-2.0, 2.0))
    row = torch.cat([torch.tensor([1.0]), bounds, low, high, torch.zeros(18)])
    scales = sign * torch.tensor([1.0, 0.37, 3e-5, 1e30, 3e38, 1e-37, 1e-39, 1e-44])
    weights = row * scales.unsqueeze(1)
    assert same(quantize(weights), expected(weights))


def test_every_500th_float_up_to_one(quantize: Quantize) -> None:
    """Scaled weights from 0 to 1 and from -1 to -0, in blocks whose scale is 1; all would take minutes."""
    bits = torch.arange(0, 0x3F800001, 499, dtype=torch.int32)
    numbers = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    weights = torch.nn.functional.pad(numbers[: numbers.numel() // 63 * 63].view(-1, 63), (1, 0), value=1.0)
    assert same(quantize(weights), expected(weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(quantize: Quantize, dtype: torch.dtype) -> None:
    """All bit patterns, NaN and infinities too, shuffled into blocks, and each as the scale of a block."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    shuffled = every[torch.randperm(every.numel(), generator=torch.Generator().manual_seed(0))].view(dtype)
    assert same(quantize(shuffled), expected(shuffled))
    finite = every.view(dtype)[every.view(dtype).isfinite()]
    finite = finite[torch.randperm(finite.numel(), generator=torch.Generator().manual_seed(1))]
    assert same(quantize(finite), expected(finite))
    weights = torch.outer(finite.float(), torch.linspace(-1, 1, 64)).to(dtype)
    assert same(quantize(weights), expected(weights))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_any_bit_patterns(on_isa: Callable[[str], None], isa: str, dtype: torch.dtype) -> None:
    on_isa(isa)
    bits, view = (16, torch.int16) if dtype.itemsize == 2 else (32, torch.int32)
    pattern = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(pattern, min_size=1, max_size=200))
    def check(patterns: list[int]) -> None:
        weights = torch.tensor(patterns, dtype=view).view(dtype)
        parts = empty_parts(weights)
        nf4_blocks.quantize_blocks(weights, *parts)
        assert same(parts, expected(weights))

    check()


@pytest.mark.parametrize("special", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, 63, 64, 130])
def test_a_bad_weight_shows_in_the_scale(quantize: Quantize, special: str, place: int) -> None:
    weights = draw_weights(140, torch.float32, 3)
    weights[weights.abs() > 1e30] = 1.0
    weights[place] = float(special)
    _, absmax = quantize(weights)
    assert absmax.isfinite().tolist() == [place // 64 != block for block in range(3)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_any_address(on_isa: Callable[[str], None], isa: str, dtype: torch.dtype) -> None:
    """Weights and q at odd addresses; not a byte before or behind the results changes."""
    on_isa(isa)
    compiled = library()
    assert compiled is not None
    draw = random.Random(0)
    for numel in (1, 2, 63, 64, 65, 127, 300):
        weights = draw_weights(numel, dtype, numel)
        theirs = expected(weights)
        for _ in range(8):
            shift = draw.randrange(1, 64), draw.randrange(1, 64), draw.randrange(1, 16)
            source = ctypes.create_string_buffer(shift[0] + weights.nbytes)
            ctypes.memmove(ctypes.addressof(source) + shift[0], weights.data_ptr(), weights.nbytes)
            q, absmax = torch.full((600,), 0xAA, dtype=torch.uint8), torch.full((60,), -7.0)
            found = compiled.moe_nf4_encode(
                ctypes.addressof(source) + shift[0],
                DTYPES[dtype],
                numel,
                q.data_ptr() + shift[1],
                absmax.data_ptr() + 4 * shift[2],
                1,
            )
            assert found == 0
            ours = torch.full_like(q, 0xAA), torch.full_like(absmax, -7.0)
            ours[0][shift[1] :][: theirs[0].numel()] = theirs[0]
            ours[1][shift[2] :][: theirs[1].numel()] = theirs[1]
            assert torch.equal(q, ours[0])
            assert torch.equal(absmax, ours[1])


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_threads_change_nothing(quantize: Quantize, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    weights = draw_weights(2**19 + 33, torch.bfloat16, 1)
    monkeypatch.setattr(nf4_blocks, "CHUNK", 2**16)
    monkeypatch.setattr(nf4_blocks, "DEVICE_CHUNK", 2**17)
    torch.set_num_threads(threads)
    ours = quantize(weights)
    assert torch.get_num_threads() == threads
    assert same(ours, expected(weights))


def test_other_dtypes_are_rounded_to_float32(quantize: Quantize) -> None:
    weights = torch.randn(333, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert same(quantize(weights), expected(weights.float()))


def test_weights_that_lie_apart(quantize: Quantize) -> None:
    weights = draw_weights(64 * 100, torch.bfloat16, 0).view(64, 100).T
    assert same(quantize(weights), expected(weights.contiguous()))


@pytest.mark.parametrize(("dtype", "numel", "threads"), [(3, 64, 1), (-1, 64, 1), (0, -1, 1), (0, 64, 0)])
def test_bad_arguments_are_refused(dtype: int, numel: int, threads: int) -> None:
    if (compiled := library()) is None:
        pytest.skip("the library was not compiled")
    weights = torch.zeros(64)
    q, absmax = empty_parts(weights)
    pointers = weights.data_ptr(), dtype, numel, q.data_ptr(), absmax.data_ptr(), threads
    assert compiled.moe_nf4_encode(*pointers) == 1
    assert q.eq(0xAA).all()


def test_an_expert_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, by torch."""
    specs = [TensorSpec("w", (70, 130)), TensorSpec("w_bias", (70,))]
    tensors = {
        "w": draw_weights(70 * 130, torch.bfloat16, 5).view(70, 130).clamp(-1, 1),
        "w_bias": torch.ones(70),
    }
    codec = NF4Codec()
    layout = codec.layout(specs)
    buffers = [torch.empty(layout.nbytes, dtype=torch.uint8) for _ in range(2)]
    codec.encode(tensors, layout, buffers[0])
    monkeypatch.setattr(nf4_blocks, "library", lambda: None)
    codec.encode(tensors, layout, buffers[1])
    assert torch.equal(*buffers)
