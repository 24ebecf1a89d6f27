"""moe_linear against float64 products of the decoded weights: every instruction set, format and shape."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.offload.native.library import BF16, FLOATS, FORMATS, INT8, INT16, ISAS, loaded_library
from support import packed
from support.packed import UNLIKE
from support.variants import others_slow

BOUNDS = {FLOATS: 3e-6, INT16: 7e-5, INT8: 9e-3, BF16: 3e-3}
"""Largest error of y relative to the sizes of its factors, |x| * |w| (see `error`)."""

SHAPES = [
    *((1, 1), (63, 1), (1, 63), (5, 64), (65, 65), (64, 127), (127, 128), (192, 192), (33, 1000)),
    (300, 320),  # 1500 blocks: more than one scale of scales, and rows that cross from one to the next
    (17, 4096 + 64),
    (2, 33344),  # more than one stretch of decoded scales a row
    (77, 896),  # whole blocks of every format, and tiles that are not full
]
TOKENS = (1, 2, 3, 4, 5, 7, 16, 17, 33, 128, 129, 300)
FEW_TOKENS = (1, 2, 3, 4, 5, 16, 33, 129)
"""Enough for formats whose tiles are those of others."""
LARGEST_INPUT = 300 * (4096 + 64)
"""Numbers of activations: what is wider has fewer tokens, of which a few and a batch are enough."""


@functools.cache
def activations_of(tokens: int, cols: int, rounded: bool, seed: int = 0) -> torch.Tensor:
    """x [T, cols], normal; what is said to come from bf16, and so is `rounded`, does."""
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed + cols))
    return x.bfloat16().float() if rounded else x


class Product(NamedTuple):
    """A matrix, activations, and what is to come out."""

    matrix: Any
    x: torch.Tensor
    want: torch.Tensor
    """float64 [T, rows]."""
    sizes: torch.Tensor
    """|x| * |w| of each token and row, [T, rows]: how large random products are. Relative to the product
    itself, a sum that happens to cancel would count as an error."""

    @classmethod
    def of(cls, m: Any, x: torch.Tensor) -> Product:
        double = x.double()
        return cls(m, x, m.product(x), double.norm(dim=1).unsqueeze(1) * m.weights.norm(dim=1))

    def error(self, got: torch.Tensor) -> float:
        """What is off in the product of the first tokens, relative to their sizes."""
        tokens = got.shape[0]
        off, size = (got.double() - self.want[:tokens]).norm(), self.sizes[:tokens].norm()
        return float(off / size if size else off)  # a single weight may be zero


@functools.cache
def product_of(format: str, rows: int, cols: int, rounded: bool) -> Product:
    """With as many tokens as are tried; made once for all instruction sets."""
    m = packed.pack(format, rows, cols, seed=rows + cols, bias=rows % 2 == 1)
    most = max(tokens for tokens in TOKENS if tokens * cols <= LARGEST_INPUT)
    made = Product.of(m, activations_of(most, cols, rounded))
    return made._replace(matrix=m._replace(weights=None))


@pytest.mark.parametrize("activations", BOUNDS)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_product_of_the_decoded_weights(isa: str, format: str, activations: int) -> None:
    for rows, cols in SHAPES:
        product = product_of(format, rows, cols, activations == BF16)
        for tokens in TOKENS if format in ("nf4", "int8", "bf16") else FEW_TOKENS:
            if tokens <= product.x.shape[0]:
                off = product.error(packed.linear(product.matrix, product.x[:tokens], activations))
                assert off < BOUNDS[activations], (rows, cols, tokens, off)


@pytest.mark.parametrize("activations", BOUNDS)
@pytest.mark.parametrize("format", ["nf4", "int8", "q3", "q2"])
def test_no_address_needs_more_than_an_elements_alignment(isa: str, format: str, activations: int) -> None:
    for cols in (64, 192, 256, 65, 1000):
        x = torch.randn(7, cols, generator=torch.Generator().manual_seed(cols))
        m = packed.pack(format, 37, cols)
        aligned = {tokens: packed.linear(m, x[:tokens], activations) for tokens in (1, 4, 7)}
        for shift in (1, 3):
            m = packed.pack(format, 37, cols, shift=shift)
            assert m.struct.q % 2 == 1
            for tokens, want in aligned.items():
                assert torch.equal(packed.linear(m, x[:tokens], activations, shift=shift), want)


TILED_FROM_FIVE = {
    "avx2": {("nf4", INT16), ("nf4", INT8)},
    "avx512_vnni": {("nf4", INT8), ("mxfp4", INT8), ("nvfp4", INT8)},
    "avx512": {("nf4", INT8), ("mxfp4", INT8), ("nvfp4", INT8)},
}
"""Where five tokens go faster in tiles of integers, in which they are rounded otherwise than alone."""


@pytest.mark.parametrize(
    ("format", "activations"),
    [
        *((format, INT16) for format in ("nf4", "mxfp4", "nvfp4", "q3", "q2")),
        *((format, INT8) for format in ("nf4", "mxfp4", "nvfp4", "int8", "q3", "q2")),
        *((format, FLOATS) for format in ("q3", "q2")),
    ],
)
def test_some_tokens_have_the_bits_that_each_has_alone(isa: str, format: str, activations: int) -> None:
    """Where they are multiplied in registers, four at a time, whatever tiles are made of."""
    most = 4 if (format, activations) in TILED_FROM_FIVE.get(isa, ()) else 8
    for cols in (320, 8192 + 64):  # of the longer ones, rows go in pairs
        m = packed.pack(format, 35, cols)
        x = torch.randn(most, cols, generator=torch.Generator().manual_seed(cols))
        alone = torch.cat([packed.linear(m, each, activations) for each in x.split(1)])
        for tokens in range(2, most + 1):
            assert torch.equal(packed.linear(m, x[:tokens], activations), alone[:tokens]), (cols, tokens)


@functools.cache
def woken(format: str) -> Any:
    """Enough bytes that threads are woken, and a last chunk that is not whole."""
    return packed.pack(format, 2100, 320)._replace(weights=None)


@pytest.mark.parametrize("activations", BOUNDS)
@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_the_number_of_threads_changes_no_bit(isa: str, format: str, activations: int) -> None:
    m = woken(format)
    x = torch.randn(21, 320, generator=torch.Generator().manual_seed(0))
    for tokens in (1, 4, 9, 21):
        alone = packed.linear(m, x[:tokens], activations)
        for threads in (2, 3, 1000):
            assert torch.equal(packed.linear(m, x[:tokens], activations, threads), alone)


@pytest.mark.parametrize("activations", BOUNDS)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_no_whole_number_overflows(isa: str, format: str, activations: int) -> None:
    """All weights and activations as large as they get, so that every product of a block has one sign."""
    m = packed.pack(format, 4, 512, bias=False)
    q = m.memory[0]
    rows = torch.tensor([[0xFF, 0x00], [0x00, 0xFF], [0x0F, 0xF0], [0xF0, 0x0F]], dtype=torch.uint8)
    if format == "int8":
        rows = torch.tensor([[127, -128], [-128, 127], [-128, -128], [127, 127]], dtype=torch.int8)
    q.copy_(rows.repeat(1, q.numel() // 8).flatten())
    if format == "nf4":
        nibbles = torch.stack([q >> 4, q & 15], dim=1).flatten().long()
        per_block = packed.LEVELS.double()[nibbles].view(-1, 64)
        scales = decoded_scales(m)
        weights = (per_block * scales.unsqueeze(1)).view(4, 512)
    else:
        scales = m.memory[1].view(torch.float16).double()
        weights = q.double().view(4, 512) * scales.repeat_interleave(64).view(4, 512)
    signs = [torch.ones(512), -torch.ones(512), torch.tensor([1.0, -1.0]).repeat(256)]
    for x in signs:
        for tokens in (1, 3, 17):
            got = packed.linear(m, (3.7 * x).repeat(tokens, 1), activations)
            want = (3.7 * x).double().repeat(tokens, 1) @ weights.T
            sizes = 3.7 * float(weights.abs().sum(1).max())
            assert torch.allclose(got.double(), want, rtol=0, atol=2e-3 * sizes)


def decoded_scales(m: Any) -> torch.Tensor:
    """Of an NF4 matrix' blocks, float64."""
    _, codes, nested, offset, _ = m.memory
    blocks = packed.dynamic_map(torch.device("cpu"))[codes.long()]
    return (blocks * nested.repeat_interleave(256)[: codes.numel()] + offset).double()


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    isa=st.integers(0, len(ISAS) - 1),
    activations=st.sampled_from(list(BOUNDS)),
    rows=st.integers(1, 80),
    cols=st.one_of(st.integers(1, 300), st.integers(1, 12).map(lambda blocks: 64 * blocks)),
    tokens=st.integers(0, 20),
    threads=st.integers(1, 5),
    shift=st.integers(0, 7),
    seed=st.integers(0, 1000),
    bias=st.booleans(),
)
def test_any_shape_anywhere(isa: int, format: str, activations: int, **case: Any) -> None:

    lib = loaded_library()
    if lib is None or lib.moe_set_isa(min(isa, lib.moe_best_isa())) != 0:
        pytest.skip("no library")
    try:
        m = packed.pack(
            format, case["rows"], case["cols"], seed=case["seed"], bias=case["bias"], shift=case["shift"]
        )
        x = activations_of(case["tokens"], case["cols"], activations == BF16, case["seed"])
        got = packed.linear(m, x, activations, case["threads"], case["shift"])
        if case["tokens"]:
            # Few numbers average less out: a single product is off by what its two factors are.
            assert Product.of(m, x).error(got) < 2 * BOUNDS[activations]
    finally:
        lib.moe_set_isa(lib.moe_best_isa())


def test_no_tokens_are_no_work(lib: Any) -> None:
    assert packed.linear(packed.pack("nf4", 3, 64), torch.empty(0, 64), FLOATS).shape == (0, 3)


def test_sets_are_named_in_order(lib: Any) -> None:
    for number in range(lib.moe_best_isa() + 1):
        assert lib.moe_set_isa(number) == 0
        assert lib.moe_isa() == number
    assert lib.moe_best_isa() < len(ISAS)
