"""moe_norm and moe_gated_norm against transformers' formulas, moe_route against torch's softmax and top-k."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from moe_local.offload.native.library import DTYPES, FORMATS, SIGMOID, SOFTMAX, Router
from support import packed

OK, BAD_ARGUMENT = 0, 1
OUTSIDE = 77.0
WIDTHS = (1, 2, 7, 16, 33, 64, 100, 1000, 4096)


class Normed(NamedTuple):
    got: torch.Tensor
    want: torch.Tensor


def normed(
    lib: Any,
    x: torch.Tensor,
    epsilon: float = 1e-5,
    in_place: bool = False,
    shifted: bool = False,
    gate: torch.Tensor | None = None,
    threads: int = 2,
) -> Normed:
    """moe_norm, or moe_gated_norm, of x [T, D] by a random weight, written between guards; and transformers'
    own."""
    tokens, width = x.shape
    cls = Qwen3NextRMSNormGated if gate is not None else GemmaRMSNorm if shifted else MixtralRMSNorm
    norm = cls(width, epsilon).to(x.dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(width)))
        want = norm(x) if gate is None else norm(x, gate)
    memory = torch.full((tokens * width + 32,), OUTSIDE, dtype=x.dtype)
    y = memory[16 : 16 + tokens * width].view(tokens, width)
    if in_place:
        y.copy_(x)
    source, weight = (y if in_place else x).data_ptr(), norm.weight.data_ptr()
    rest = epsilon, tokens, width, DTYPES[x.dtype], y.data_ptr(), threads
    if gate is None:
        assert lib.moe_norm(source, weight, shifted, *rest) == OK
    else:
        assert lib.moe_gated_norm(source, gate.data_ptr(), weight, *rest) == OK
    assert (memory[:16] == OUTSIDE).all()
    assert (memory[-16:] == OUTSIDE).all()
    return Normed(y, want)


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many numbers of the dtype lie between two of them, at most."""
    kind = torch.int32 if a.dtype is torch.float32 else torch.int16

    def place(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(kind).long()
        return torch.where(bits < 0, -(bits & torch.iinfo(kind).max), bits)

    return int((place(a) - place(b)).abs().max())


def tokens_of(count: int, width: int, dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count + width)
    return (torch.randn(count, width, generator=generator) * size).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_place", "shifted"), [(False, False), (True, False), (False, True)])
def test_norms_as_transformers_do(
    lib: Any, isa: str, dtype: torch.dtype, in_place: bool, shifted: bool
) -> None:
    """Of 16 bits, the quotient may be rounded to the next number, which is up to two steps of the product.

    One that is not rounded before gives the next number at most.

    Of 32, a step each for the sum, root, quotient and product, and more for sums of a thousand in a row.
    """
    for width in WIDTHS:
        most = 2 - shifted if dtype is not torch.float32 else 12 if isa == "portable" and width > 1000 else 4
        for count in (1, 3):
            for size in (1e-4, 1.0, 100.0):
                for epsilon in (1e-6, 1e-5, 0.1):
                    got, want = normed(lib, tokens_of(count, width, dtype, size), epsilon, in_place, shifted)
                    apart = steps_apart(got, want)
                    assert apart <= most, (width, count, size, epsilon, apart)
                    assert dtype is torch.float32 or (got != want).float().mean() < 0.01 + 1 / width


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_sizes_at_the_ends(lib: Any, isa: str, dtype: torch.dtype) -> None:
    for size in (0.0, 1e-30, 1e-7, 3e4, 1e18, 3e38):
        x = tokens_of(2, 64, torch.float32).clamp(-1, 1).mul(size).to(dtype)
        got, want = normed(lib, x)
        same = (got == want) | (got.isnan() & want.isnan()) | (got - want).abs().le(2e-2 * want.abs())
        assert same.all(), size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_number_that_is_none_spoils_its_token_and_no_other(
    lib: Any, isa: str, dtype: torch.dtype, bad: str
) -> None:
    for width, place in ((64, 3), (33, 32)):
        x = tokens_of(3, width, dtype)
        clean = normed(lib, x).got.clone()
        x[1, place] = float(bad)
        got, want = normed(lib, x)
        assert torch.equal(got[1].isnan(), want[1].isnan())
        assert got[1, place].isnan()
        assert torch.equal(got[[0, 2]], clean[[0, 2]])


def gates_of(x: torch.Tensor, size: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(x.shape[1])
    return (torch.randn(x.shape, generator=generator) * size).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_gated_norms_as_transformers_do(lib: Any, isa: str, dtype: torch.dtype, in_place: bool) -> None:
    """Of 16 bits, the quotient, the norm and the answer may each be rounded to the next number."""
    for width in WIDTHS:
        most = 3 if dtype is not torch.float32 else 12 if isa == "portable" and width > 1000 else 6
        for count in (1, 3):
            for size, epsilon in ((1e-4, 1e-6), (1.0, 1e-5), (100.0, 0.1)):
                x = tokens_of(count, width, dtype, size)
                got, want = normed(lib, x, epsilon, in_place, gate=gates_of(x))
                apart = steps_apart(got, want)
                assert apart <= most, (width, count, size, epsilon, apart)
                assert dtype is torch.float32 or (got != want).float().mean() < 0.01 + 1 / width


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_at_the_ends(lib: Any, isa: str, dtype: torch.dtype) -> None:
    """Those that are shut leave nothing, or less than a number near one can show."""
    ends = [0.0, -0.0, 1e-7, 20, -20, 100, -100, 3e4, -3e4]
    gate = torch.tensor(ends).to(dtype).repeat_interleave(7)[None]
    got, want = normed(lib, tokens_of(1, 63, dtype), gate=gate)
    assert torch.allclose(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-30)
    for bad, place in ((torch.nan, 3), (torch.inf, 62)):
        gate[0, place] = bad
        spoilt, want = normed(lib, tokens_of(1, 63, dtype), gate=gate)
        assert not spoilt[0, place].isfinite()
        assert torch.equal(spoilt.isfinite(), want.isfinite())
        kept = spoilt.isfinite()
        assert torch.equal(spoilt[kept], got[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(5000, 64), (333, 1000), (20, 20000)])
def test_threads_change_no_norm(lib: Any, isa: str, tokens: int, width: int, dtype: torch.dtype) -> None:
    """Of more tokens than a chunk has; and each is as alone."""
    x = tokens_of(tokens, width, dtype)
    for shifted, gate in ((False, None), (True, None), (False, gates_of(x))):
        alone, want = normed(lib, x, shifted=shifted, gate=gate, threads=1)
        assert torch.allclose(alone, want, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)
        for threads in (2, 3, 1000):
            assert torch.equal(normed(lib, x, shifted=shifted, gate=gate, threads=threads).got, alone)
        for t in (0, 1, tokens - 1):
            own = None if gate is None else gate[t : t + 1]
            assert torch.equal(normed(lib, x[t : t + 1], shifted=shifted, gate=own).got[0], alone[t])


def test_wrong_norms_are_refused(lib: Any) -> None:
    x, weight, y = torch.ones(2, 8), torch.ones(8), torch.full((2, 8), OUTSIDE)
    pointers, rest = (x.data_ptr(), weight.data_ptr()), (1e-5, 2, 8, 0, y.data_ptr(), 1)
    wrong = [(0, None), (1, None), (4, -1), (5, 0), (5, -8), (5, 2**62), (6, -1), (6, 3), (7, None), (8, 0)]
    calls = (
        (lib.moe_norm, [*pointers, 0, *rest], [*wrong, (8, -1)], [None, None, 0, 1e-5, 0, 8, 0, None, 1]),
        (
            lib.moe_gated_norm,
            [pointers[0], x.data_ptr(), pointers[1], *rest],
            [*wrong, (2, None)],
            [None, None, None, 1e-5, 0, 8, 0, None, 1],
        ),
    )
    for norm, good, changes, nothing in calls:
        for place, value in changes:
            assert norm(*good[:place], value, *good[place + 1 :]) == BAD_ARGUMENT, (place, value)
            assert (y == OUTSIDE).all()
        assert norm(*nothing) == OK
        assert norm(*good) == OK
        assert not (y == OUTSIDE).any()
        y.fill_(OUTSIDE)


class Routed(NamedTuple):
    logits: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


class Route:
    """A call of moe_route: the router's matrix and a token for it."""

    def __init__(self, format: str, rows: int, cols: int, dtype: torch.dtype, **of_pack: Any):
        self.matrix = packed.pack(format, rows, cols, **of_pack)
        self.x = tokens_of(1, cols, dtype, 1 / cols**0.5)[0]
        self.logits = torch.full((rows + 32,), OUTSIDE, dtype=dtype)
        self.weights = torch.full((rows + 32,), OUTSIDE)
        self.ids = torch.full((rows + 32,), 77, dtype=torch.int64)
        self.router = Router(ctypes.pointer(self.matrix.struct), scaling=1.0, logits_dtype=DTYPES[dtype])

    def call(self, lib: Any, top_k: int, normalized: bool = False, **changed: Any) -> int:
        self.router.top_k, self.router.normalized = top_k, normalized
        arguments = {
            "router": ctypes.byref(self.router),
            "x": self.x.data_ptr(),
            "tokens": 1,
            "dtype": DTYPES[self.x.dtype],
            "logits": self.logits[16:].data_ptr(),
            "weights": self.weights[16:].data_ptr(),
            "ids": self.ids[16:].data_ptr(),
            "threads": 1,
        }
        status: int = lib.moe_route(*(arguments | changed).values())
        return status

    def __call__(self, lib: Any, top_k: int, normalized: bool = False) -> Routed:
        for memory in (self.logits, self.weights, self.ids):
            memory.fill_(OUTSIDE)
        assert self.call(lib, top_k, normalized) == OK
        rows = self.matrix.struct.rows
        for memory, used in ((self.logits, rows), (self.weights, top_k), (self.ids, top_k)):
            assert (memory[:16] == OUTSIDE).all()
            assert (memory[16 + used :] == OUTSIDE).all()
        found = self.logits[16 : 16 + rows], self.weights[16 : 16 + top_k], self.ids[16 : 16 + top_k]
        return Routed(*(tensor.clone() for tensor in found))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_routes_as_torch_does(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for rows, cols, bias in ((8, 64, None), (60, 100, torch.float32), (128, 256, dtype), (1, 7, None)):
        options = {"bias": bias is not None, "bias_dtype": bias or torch.float32}
        route = Route(format, rows, cols, dtype, seed=rows, **options)
        want = route.matrix.product(route.x[None])[0]
        for top_k in {1, min(2, rows), min(8, rows), rows}:
            for normalized in (False, True):
                logits, weights, ids = route(lib, top_k, normalized)
                assert logits.dtype is dtype
                assert ((logits.double() - want).abs() <= eps * (want.abs() + want.abs().max() * 4)).all()
                shares, chosen = logits.float().softmax(-1).topk(top_k)
                if normalized:
                    shares = shares / shares.sum()
                assert torch.allclose(weights, shares, rtol=2e-6, atol=1e-12)
                assert sorted(ids.tolist()) == sorted(set(ids.tolist()))
                # of equal ones, torch takes any
                assert torch.equal(logits[ids], logits[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_each_of_several_tokens_is_routed_as_alone(
    lib: Any, isa: str, format: str, dtype: torch.dtype
) -> None:
    route = Route(format, 60, 100, dtype)
    tokens = tokens_of(11, 100, dtype, 0.3)
    alone = []
    for token in tokens:
        route.x.copy_(token)
        alone.append(route(lib, 8, True))
    logits = torch.empty(11, 60, dtype=dtype)
    weights, ids = torch.empty(11, 8), torch.empty(11, 8, dtype=torch.int64)
    outputs = {"logits": logits.data_ptr(), "weights": weights.data_ptr(), "ids": ids.data_ptr()}
    for threads in (1, 3):
        assert route.call(lib, 8, True, x=tokens.data_ptr(), tokens=11, **outputs, threads=threads) == OK
        for got, want in zip((logits, weights, ids), zip(*alone, strict=True), strict=True):
            assert torch.equal(got, torch.stack(want))
            got.zero_()
    assert route.call(lib, 8, True, x=tokens.data_ptr(), tokens=11, **outputs | {"logits": None}) == OK
    assert not logits.any()
    assert torch.equal(ids, torch.stack([routed.ids for routed in alone]))


def with_logits(logits: list[float], dtype: torch.dtype = torch.float32) -> Route:
    """A router that answers these, whatever the token."""
    route = Route("fp32", len(logits), 4, dtype)
    route.matrix.memory[0].zero_()
    route.matrix.memory[-1].copy_(torch.tensor(logits))
    return route


def chosen(route: Route, top_k: int, normalized: bool, correction: torch.Tensor | None) -> Routed:
    """As DeepSeek-V3's router does it in torch; sorted by what the choice is by."""
    router = route.router
    logits = route.matrix.product(route.x[None])[0].float()
    scores = logits.sigmoid() if router.scoring == SIGMOID else logits.softmax(-1)
    ranked = scores if correction is None else scores + correction.float()
    if router.groups:
        groups = ranked.view(router.groups, -1)
        best = groups.topk(router.best).values.sum(-1).topk(router.top_groups).indices
        mask = torch.ones(router.groups, dtype=torch.bool).scatter(0, best, False)
        ranked = groups.masked_fill(mask[:, None], -torch.inf).flatten()
    ids = ranked.topk(top_k).indices
    weights = scores[ids]
    if normalized:
        weights = weights / weights.sum()
    return Routed(logits, weights * router.scaling, ids)


@pytest.mark.parametrize("scoring", [SOFTMAX, SIGMOID])
@pytest.mark.parametrize("corrected", [None, *DTYPES])
@pytest.mark.parametrize("grouped", [(0, 0, 0), (4, 2, 1), (4, 2, 2), (8, 3, 2), (64, 9, 1)])
def test_scores_corrections_and_groups(
    lib: Any, isa: str, grouped: tuple[int, int, int], corrected: torch.dtype | None, scoring: int
) -> None:
    for seed in range(5):
        route = Route("fp32", 64, 32, torch.bfloat16, seed=seed)
        route.logits = torch.full((64 + 32,), OUTSIDE)
        generator = torch.Generator().manual_seed(seed)
        correction = None if corrected is None else (torch.randn(64, generator=generator) / 4).to(corrected)
        router = route.router
        router.logits_dtype, router.scoring, router.scaling = DTYPES[torch.float32], scoring, 2.5
        router.groups, router.top_groups, router.best = grouped
        if correction is not None:
            router.correction, router.correction_dtype = correction.data_ptr(), DTYPES[correction.dtype]
        for normalized in (False, True):
            got, want = route(lib, 8, normalized), chosen(route, 8, normalized, correction)
            assert torch.allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)
            assert got.ids.tolist() == want.ids.tolist()
            assert torch.allclose(got.weights, want.weights, rtol=1e-5)
            router.dtype = DTYPES[torch.bfloat16]
            assert torch.equal(route(lib, 8, normalized).weights, got.weights.bfloat16().float())
            router.dtype = DTYPES[torch.float32]


def test_the_earlier_of_equals_comes_first(lib: Any, isa: str) -> None:
    for dtype in DTYPES:
        route = with_logits([0.5, 2.0, 0.5, 2.0, 2.0, -1.0, 0.5], dtype)
        assert route(lib, 7).ids.tolist() == [1, 3, 4, 0, 2, 6, 5]
        assert route(lib, 2, True).weights.tolist() == [0.5, 0.5]
    # Rounded to bf16 they are equal, and that is what the choice is by.
    assert with_logits([1.0, 1.001], torch.bfloat16)(lib, 1).ids.tolist() == [0]
    assert with_logits([1.0, 1.001])(lib, 1).ids.tolist() == [1]


def test_logits_far_from_each_other(lib: Any, isa: str) -> None:
    found = with_logits([-3e4, 3e4, 2e4])(lib, 3)
    assert found.ids.tolist()[0] == 1
    assert found.weights.tolist() == [1.0, 0.0, 0.0]
    assert with_logits([-3e38, 3e38])(lib, 2, True).weights.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_numbers_that_are_none(lib: Any, isa: str, bad: str) -> None:
    """Every share is NaN then, as torch has it; the ids are some that there are."""
    for place in range(3):
        logits = [1.0, 2.0, 3.0]
        logits[place] = float(bad)
        for normalized in (False, True):
            found = with_logits(logits)(lib, 2, normalized)
            assert found.weights.isnan().all()
            assert sorted(set(found.ids.tolist())) == sorted(found.ids.tolist())
            assert set(found.ids.tolist()) <= {0, 1, 2}
    route = Route("bf16", 8, 64, torch.bfloat16)
    route.x[3] = float(bad)
    assert route(lib, 2).weights.isnan().all()


def test_wrong_routes_are_refused(lib: Any) -> None:
    def refused(route: Route, top_k: int = 2, **changed: Any) -> None:
        assert route.call(lib, top_k, **changed) == BAD_ARGUMENT, (top_k, changed)
        for memory in (route.logits, route.weights, route.ids):
            assert (memory == OUTSIDE).all()

    for format in FORMATS:
        for name in ("router", "x", "weights", "ids"):
            refused(Route(format, 8, 64, torch.float32), **{name: None})
        for top_k in (0, -1, 9, 2**62):
            refused(Route(format, 8, 64, torch.float32), top_k)
        refused(Route(format, 8, 64, torch.float32), threads=0)
        for tokens in (0, -1, 257):
            refused(Route(format, 8, 64, torch.float32), tokens=tokens)
        for dtype in (-1, 3):
            refused(Route(format, 8, 64, torch.float32), dtype=dtype)
        for field, value in (("q", None), ("rows", 0), ("cols", -1), ("format", 99), ("bias_dtype", -1)):
            route = Route(format, 8, 64, torch.float32)
            setattr(route.matrix.struct, field, value)
            refused(route)
    grouped = {"groups": 4, "top_groups": 2, "best": 2}
    for wrong in (
        *({"dtype": 3}, {"logits_dtype": -1}, {"scoring": 2}, {"matrix": None}, {"groups": -1}),
        *(grouped | {"groups": 3}, grouped | {"groups": 300}, grouped | {"best": 0}, grouped | {"best": 3}),
        *(
            grouped | {"top_groups": 0},
            grouped | {"top_groups": 5},
            {"groups": 8, "top_groups": 2, "best": 2},
        ),
    ):
        route = Route("fp32", 8, 64, torch.float32)
        for field, value in wrong.items():
            setattr(route.router, field, value)
        refused(route)
    route = Route("fp32", 8, 64, torch.float32)
    for field, value in grouped.items():
        setattr(route.router, field, value)
    refused(route, 5)  # more than two groups have
    assert route.call(lib, 4) == OK
    route.router.correction, route.router.correction_dtype = route.x.data_ptr(), 3
    assert route.call(lib, 4) == BAD_ARGUMENT
