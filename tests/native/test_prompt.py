"""moe_prompt_attention against float64, and moe_seen: every instruction set and dtype, any mask of spans."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import pytest
import torch

from moe_local.offload.native.library import DTYPES, PromptAttention, Strided
from support.packed import off

OK, BAD_ARGUMENT, SCATTERED = 0, 1, 4
OUTSIDE = 77.0
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Largest relative error, in the Frobenius norm."""


class Case(NamedTuple):
    sequences: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    value_width: int


CASES = (
    Case(1, 1, 1, 1, 1, 16, 16),
    Case(2, 4, 4, 7, 7, 64, 64),
    Case(1, 8, 2, 70, 130, 32, 48),  # more than a block of keys, and narrower keys than values
    Case(1, 6, 1, 33, 64, 80, 16),
    Case(2, 3, 1, 129, 200, 192, 128),  # several chunks of queries
)


class Inputs:
    """Random q, k and v of a case; tokens lie in front of heads in q, as projections leave them."""

    def __init__(self, case: Case, dtype: torch.dtype, size: float = 1.0) -> None:
        self.case, generator = case, torch.Generator().manual_seed(case.queries + case.width)

        def draw(*shape: int) -> torch.Tensor:
            return (size * torch.randn(*shape, generator=generator)).to(dtype)

        self.q = draw(case.sequences, case.queries, case.heads, case.width).transpose(1, 2)
        whole = draw(case.sequences, case.kv_heads, case.keys + 3, case.width)  # of a longer cache
        self.k = whole[:, :, : case.keys]
        self.v = draw(case.sequences, case.kv_heads, case.keys, case.value_width)

    def call(self, seen: torch.Tensor, sinks: torch.Tensor | None = None) -> PromptAttention:
        """A call whose result, `self.y`, is written between guards."""
        case = self.case
        count = case.sequences * case.queries * case.heads * case.value_width
        self.memory = torch.full((count + 32,), OUTSIDE, dtype=self.q.dtype)
        self.y = self.memory[16:-16].view(case.sequences, case.queries, case.heads, case.value_width)
        return PromptAttention(
            *(Strided(x.data_ptr(), *x.stride()[:3]) for x in (self.q, self.k, self.v)),
            *(seen.data_ptr(), None if sinks is None else sinks.data_ptr(), self.y.data_ptr()),
            *(case.sequences, case.queries, case.keys, case.heads, case.kv_heads),
            *(case.width, case.value_width, case.width**-0.5, DTYPES[self.q.dtype]),
        )

    def got(self, lib: Any, seen: torch.Tensor, sinks: torch.Tensor | None = None, threads: int = 3) -> Any:
        assert lib.moe_prompt_attention(ctypes.byref(self.call(seen, sinks)), threads) == OK
        assert (self.memory[:16] == OUTSIDE).all()
        assert (self.memory[-16:] == OUTSIDE).all()
        return self.y

    def want(self, mask: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """By the formula, in float64, with a mask [B, T, S]."""
        case, (q, k, v) = self.case, (x.double() for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)) * case.width**-0.5
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
        if sinks is not None:
            beside = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, beside], dim=-1)
        weights = scores.softmax(-1)[..., : case.keys].nan_to_num(0)
        return (weights @ v).transpose(1, 2)


def causal(case: Case) -> torch.Tensor:
    mask = torch.ones(case.queries, case.keys, dtype=torch.bool).tril(case.keys - case.queries)
    return mask.repeat(case.sequences, 1, 1)


def seen_of(mask: torch.Tensor) -> torch.Tensor:
    seen = torch.empty(*mask.shape[:2], 2, dtype=torch.int32)
    seen[..., 0] = mask.int().argmax(-1)
    seen[..., 1] = seen[..., 0] + mask.sum(-1)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_causal_queries(lib: Any, isa: str, case: Case, dtype: torch.dtype) -> None:
    inputs, mask = Inputs(case, dtype), causal(case)
    assert off(inputs.got(lib, seen_of(mask)), inputs.want(mask)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_and_sinks(lib: Any, isa: str, dtype: torch.dtype) -> None:
    """A window of 9 positions; sinks that outweigh the scores, and that do not count."""
    for case in CASES[1:]:
        inputs = Inputs(case, dtype, size=2.0)
        mask = causal(case) & ~causal(case).tril(case.keys - case.queries - 9)
        sinks = torch.linspace(-40, 40, case.heads)
        got = inputs.got(lib, seen_of(mask), sinks)
        assert off(got, inputs.want(mask, sinks)) <= BOUNDS[dtype]
        assert off(inputs.got(lib, seen_of(mask)), inputs.want(mask)) <= BOUNDS[dtype]


def test_any_spans_and_queries_that_see_nothing(lib: Any, isa: str) -> None:
    """Spans in no order, those of neighbours far apart, as of packed or padded rows; none gives zeros."""
    case = Case(2, 4, 2, 150, 300, 32, 32)
    inputs, generator = Inputs(case, torch.float32), torch.Generator().manual_seed(4)
    ends = torch.randint(0, case.keys + 1, (2, case.queries, 2), generator=generator, dtype=torch.int32)
    seen = ends.sort(-1).values
    seen[0, ::7] = torch.tensor([5, 5], dtype=torch.int32)
    seen[1, 3] = torch.tensor([case.keys, case.keys], dtype=torch.int32)
    places = torch.arange(case.keys)
    mask = (places >= seen[..., :1]) & (places < seen[..., 1:])
    for sinks in (None, torch.zeros(case.heads)):
        got = inputs.got(lib, seen, sinks)
        assert off(got, inputs.want(mask, sinks)) <= BOUNDS[torch.float32]
        assert not got[0, ::7].any()
        assert not got[1, 3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_all_sizes(lib: Any, isa: str, dtype: torch.dtype) -> None:
    """Rising ones, whose largest changes with each block of keys, falling ones, and some so large that fp32
    keeps few digits behind the point."""
    case = Case(1, 2, 1, 40, 256, 16, 16)
    for slope in (0.5, -0.5, 3.0):
        inputs, mask = Inputs(case, dtype, size=0.1), torch.ones(1, 40, 256, dtype=torch.bool)
        inputs.q[..., 0] = 4.0
        inputs.k[..., 0] = (slope * torch.arange(256)).to(dtype)
        assert off(inputs.got(lib, seen_of(mask)), inputs.want(mask)) <= max(BOUNDS[dtype], 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_stays_with_those_that_see_it(
    lib: Any, isa: str, dtype: torch.dtype, bad: float
) -> None:
    case = Case(1, 2, 1, 100, 100, 16, 16)
    inputs, seen = Inputs(case, dtype), seen_of(causal(case))
    clean = inputs.got(lib, seen).clone()
    inputs.q[0, 1, 20, 3] = bad
    inputs.v[0, 0, 70, 5] = bad
    got = inputs.got(lib, seen)
    assert got[0, 20, 1].isnan().all()
    assert not got[0, 70:, :, 5].isfinite().any()
    got[0, 20, 1], clean[0, 20, 1] = 0, 0
    assert torch.equal(got[0, :64], clean[0, :64])
    assert torch.equal(got[0, :, :, :5], clean[0, :, :, :5])


def test_threads_and_neighbours_change_no_bit(lib: Any, isa: str) -> None:
    case = Case(2, 4, 2, 160, 160, 32, 32)
    inputs, seen = Inputs(case, torch.bfloat16), seen_of(causal(case))
    one = inputs.got(lib, seen, threads=1).clone()
    assert torch.equal(inputs.got(lib, seen, threads=4), one)
    alone = Inputs(case._replace(sequences=1), torch.bfloat16)
    alone.q, alone.k, alone.v = inputs.q[1:], inputs.k[1:], inputs.v[1:]
    assert torch.equal(alone.got(lib, seen[1:].contiguous())[0], one[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in ("seen", "y")),
        *((name, 0) for name in ("sequences", "queries", "keys", "heads", "kv_heads", "width")),
        *(("width", 24), ("value_width", 8), ("kv_heads", 3), ("keys", 6), ("scaling", 0.0), ("dtype", 3)),
    ],
)
def test_prompts_that_make_no_sense_are_refused(lib: Any, field: str, value: Any) -> None:
    case = Case(1, 4, 2, 7, 7, 16, 16)
    inputs, seen = Inputs(case, torch.float32), seen_of(causal(case))
    call = inputs.call(seen)
    assert lib.moe_prompt_attention(ctypes.byref(call), 1) == OK
    assert lib.moe_prompt_attention(None, 1) == BAD_ARGUMENT
    assert lib.moe_prompt_attention(ctypes.byref(call), 0) == BAD_ARGUMENT
    seen[0, 2, 0] = -1
    assert lib.moe_prompt_attention(ctypes.byref(call), 1) == BAD_ARGUMENT
    seen[0, 2, 0] = 0
    setattr(call, field, value)
    assert lib.moe_prompt_attention(ctypes.byref(call), 1) == BAD_ARGUMENT
    for name in "qkv":
        call = inputs.call(seen)
        getattr(call, name).numbers = None
        assert lib.moe_prompt_attention(ctypes.byref(call), 1) == BAD_ARGUMENT


def test_seen_of_masks(lib: Any) -> None:
    mask = torch.zeros(6, 50, dtype=torch.bool)
    mask[0, :7] = mask[1, 49:] = mask[2] = mask[3, 20:30] = mask[5, 0] = True
    seen = torch.full((6, 2), -1, dtype=torch.int32)
    assert lib.moe_seen(mask.data_ptr(), 6, 50, seen.data_ptr()) == OK
    assert seen.tolist() == [[0, 7], [49, 50], [0, 50], [20, 30], [0, 0], [0, 1]]
    for place in ((0, 9), (3, 31), (3, 0), (5, 49)):
        scattered = mask.clone()
        scattered[place] = True
        assert lib.moe_seen(scattered.data_ptr(), 6, 50, seen.data_ptr()) == SCATTERED
    assert lib.moe_seen(None, 6, 50, seen.data_ptr()) == BAD_ARGUMENT
    assert lib.moe_seen(mask.data_ptr(), 6, 50, None) == BAD_ARGUMENT
    assert lib.moe_seen(mask.data_ptr(), -1, 50, seen.data_ptr()) == BAD_ARGUMENT
    assert lib.moe_seen(mask.data_ptr(), 6, 0, seen.data_ptr()) == BAD_ARGUMENT
