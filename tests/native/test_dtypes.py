"""Numbers of 16 bits that go in and out: as torch rounds them, and nothing but rounding."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import pytest
import torch

from moe_local.offload.native.library import (
    BF16,
    DTYPES,
    FLOATS,
    FORMATS,
    INT8,
    INT16,
    PLAIN,
    Gate,
    Matrix,
    Router,
)
from support import packed
from support.packed import UNLIKE
from support.variants import others_slow

WAYS = (FLOATS, INT16, INT8, BF16)
HALVES = (torch.bfloat16, torch.float16)


def linear(
    lib: Any, m: Any, x: torch.Tensor, activations: int = FLOATS, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """moe_linear, in and out in the dtype of x, or what is said to be one; between guards."""
    dtype = dtype or x.dtype
    tokens, rows = x.shape[0], m.struct.rows
    memory = torch.full((tokens * rows + 32,), 77.0, dtype=dtype)
    y = memory[16 : 16 + tokens * rows].view(tokens, rows)
    addresses = ctypes.byref(m.struct), x.data_ptr(), tokens, y.data_ptr()
    assert lib.moe_linear(*addresses, DTYPES[dtype], activations, 2) == 0
    assert (memory[:16] == 77).all()
    assert (memory[16 + tokens * rows :] == 77).all()
    return y


@functools.cache
def matrix_of(format: str, rows: int, cols: int, bias: torch.dtype) -> Any:
    """Made once for all instruction sets and ways."""
    return packed.pack(format, rows, cols, bias_dtype=bias)


@functools.cache
def experts_of(format: str, width: int, hidden: int, gate: tuple[Any, ...]) -> list[Any]:
    """Four of them, made once for all instruction sets and ways."""
    return [packed.pack_expert(format, width, hidden, Gate(*gate), seed=seed) for seed in range(4)]


@pytest.mark.parametrize("activations", WAYS)
@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_products_are_those_of_floats_rounded(lib: Any, isa: str, format: str, activations: int) -> None:
    for rows, cols in ((96, 128), (33, 65), (5, 1)):
        for bias in (torch.float32, *HALVES):
            m = matrix_of(format, rows, cols, bias)
            for tokens in (1, 2, 5, 300):
                drawn = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))
                for dtype in HALVES:
                    x = drawn.to(dtype)
                    want = linear(lib, m, x.float(), activations).to(dtype)
                    assert torch.equal(linear(lib, m, x, activations), want), (dtype, rows, bias, tokens)


def experts(
    lib: Any,
    pairs: Any,
    ids: torch.Tensor,
    weights: torch.Tensor,
    x: torch.Tensor,
    gate: Gate,
    activations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """outputs, floats, and combined, in the dtype of x; all experts in one call."""
    tokens, top_k = ids.shape
    places = [(ids.flatten() == expert).nonzero().flatten() for expert in range(len(pairs))]
    starts = torch.tensor([0, *(found.numel() for found in places)]).cumsum(0)
    flat = torch.cat(places)
    rows = flat // top_k
    outputs = torch.full((tokens * top_k, x.shape[1]), 77.0)
    memory = torch.full((x.numel() + 32,), 77.0, dtype=x.dtype)
    combined = memory[16 : 16 + x.numel()].view_as(x)
    status = lib.moe_experts(
        (ctypes.c_void_p * len(pairs))(*(ctypes.addressof(pair.struct) for pair in pairs)),
        len(pairs),
        starts.data_ptr(),
        rows.data_ptr(),
        flat.data_ptr(),
        ctypes.byref(gate),
        x.data_ptr(),
        tokens,
        outputs.data_ptr(),
        weights.data_ptr(),
        top_k,
        combined.data_ptr(),
        DTYPES[x.dtype],
        activations,
        2,
    )
    assert status == 0
    assert (memory[:16] == 77).all()
    assert (memory[16 + x.numel() :] == 77).all()
    return outputs, combined


@pytest.mark.parametrize("activations", WAYS)
@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_experts_are_those_of_floats_rounded(lib: Any, isa: str, format: str, activations: int) -> None:
    gate = (1, 3, 0.0, 0.0)
    for width, hidden in ((128, 64), (33, 20)):
        pairs = experts_of(format, width, hidden, gate)
        for tokens in (1, 7, 70):
            ids, weights = packed.routing(tokens, 4, 2, seed=tokens)
            numbers = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)) / 8
            for dtype in HALVES:
                x = numbers.to(dtype)
                outputs, combined = experts(lib, pairs, ids, weights, x, Gate(*gate), activations)
                exact, floats = experts(lib, pairs, ids, weights, x.float(), Gate(*gate), activations)
                assert torch.equal(outputs, exact)
                assert torch.equal(combined, floats.to(dtype))


def interesting() -> torch.Tensor:
    """Floats: around every number of both 16-bit dtypes, halfway between two of them, and at all ends."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    numbers = torch.cat([every.view(dtype).float() for dtype in HALVES])
    numbers = numbers[torch.isfinite(numbers)]
    bits = numbers.view(torch.int32).long()
    halfway = torch.tensor([0, 1 << 15, 1 << 12])  # of bf16, and of fp16's normal numbers
    near = bits[:, None, None] + halfway[:, None] + torch.tensor([-1, 0, 1])
    subnormal = (torch.arange(-2050, 2051).double()[:, None] + torch.tensor([-0.5, 0.0, 0.5])) * 2.0**-24
    subnormal = subnormal.float().view(torch.int32).long()[..., None] + torch.tensor([-1, 0, 1])
    ends = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-45, 65504.0, 65519.996, 65520.0, 3.3895e38, 3.4028e38, float("inf")]
    )
    both = torch.cat([ends, -ends, torch.tensor([float("nan")])]).view(torch.int32).long()
    random = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    bits = torch.cat([near.flatten(), subnormal.flatten(), both, random])
    bits = bits[(bits >= -(2**31)) & (bits < 2**31)]
    return bits.to(torch.int32).view(torch.float32)


def one_by_one() -> Any:
    """The matrix [1, 1] of a one."""
    m = packed.pack("fp32", 1, 1, bias=False)
    m.memory[0].fill_(1.0)
    return m


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bit for bit; NaN is like NaN."""
    kind = torch.int32 if a.dtype is torch.float32 else torch.int16
    return (a.view(kind) == b.view(kind)) | (a.isnan() & b.isnan())


def rounded(lib: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floats x as the library rounds them to dtype: as the logits of a router whose biases they are."""
    zeros, nothing = torch.zeros(x.numel()), torch.zeros(1, dtype=dtype)
    matrix = Matrix(FORMATS["fp32"], 0, x.numel(), 1, zeros.data_ptr(), None, None, None, x.data_ptr())
    out, weight, chosen = (
        torch.empty(x.numel(), dtype=dtype),
        torch.empty(1),
        torch.empty(1, dtype=torch.int64),
    )
    outputs = out.data_ptr(), weight.data_ptr(), chosen.data_ptr()
    router = Router(ctypes.pointer(matrix), 1, 0, 1.0, DTYPES[torch.float32], DTYPES[dtype])
    assert lib.moe_route(ctypes.byref(router), nothing.data_ptr(), 1, DTYPES[dtype], *outputs, 1) == 0
    return out


@pytest.mark.parametrize("dtype", HALVES)
def test_floats_are_rounded_as_torch_does(lib: Any, isa: str, dtype: torch.dtype) -> None:
    x = interesting()
    assert x.numel() > 1_000_000
    got, want = rounded(lib, x, dtype), x.to(dtype)
    zero = x == 0  # 0 + -0 is 0
    wrong = ~same_numbers(got, want) & ~zero
    assert not wrong.any(), (x[wrong][:5], got[wrong][:5], want[wrong][:5])
    assert (got[zero] == 0).all()
    assert torch.equal(got.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_every_number_is_widened_and_back(lib: Any, isa: str, dtype: torch.dtype, count: int) -> None:
    """As inputs, one of which meets a one in the matrix; `count` a time, since few take another way."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    m = one_by_one()
    for x in every.view(-1, 1 << 8).unbind()[:: 1 if count == 5 else 16]:
        tokens = x[:, None] if count == 5 else x[:count, None].contiguous()
        got = linear(lib, m, tokens)
        wrong = ~same_numbers(got, tokens) & (tokens != 0)
        assert not wrong.any(), tokens[wrong]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_is_read_as_a_weight_and_as_a_bias(lib: Any, isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[torch.isfinite(every)]
    zeros = torch.zeros(finite.numel())
    address = finite.data_ptr()
    as_weight = Matrix(FORMATS[PLAIN[dtype]], 0, finite.numel(), 1, address, None, None, None, None)
    as_bias = Matrix(
        FORMATS["fp32"], DTYPES[dtype], finite.numel(), 1, zeros.data_ptr(), None, None, None, address
    )
    for matrix in (as_weight, as_bias):
        for tokens in (1, 5):
            y = torch.empty(tokens, finite.numel())
            one = torch.ones(tokens, 1)
            assert (
                lib.moe_linear(ctypes.byref(matrix), one.data_ptr(), tokens, y.data_ptr(), 0, FLOATS, 1) == 0
            )
            assert torch.equal(y, finite.float().expand(tokens, -1))
