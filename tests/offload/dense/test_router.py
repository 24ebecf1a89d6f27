"""Routers that run in the C++ library: which are taken, and what is left to the original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_local.offload.dense.router import FEW_TOKENS, NativeRouter, use_native_routers
from moe_local.offload.native.library import DTYPES, library

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

torch.set_num_threads(1)


class Router(nn.Module):
    """As Mixtral's and Qwen's, with details that subclasses change."""

    normalized = True

    def __init__(self, experts: int = 8, width: int = 64, top_k: int = 2, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(experts)
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(experts, width, generator=generator), requires_grad=False)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.randn(experts, generator=generator), requires_grad=False)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(-1)

    def finish(self, weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return weights

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states.reshape(-1, self.weight.shape[1]), self.weight, self.bias)
        weights, experts = self.scores(logits).topk(self.top_k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, self.finish(weights, logits), experts


class Unnormalized(Router):
    normalized = False


class InItsDtype(Router):
    """As Qwen's: weights are rounded to the dtype of the logits."""

    def finish(self, weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return weights.to(logits.dtype)


class Sigmoid(Router):
    """Divides by the sum even if all are zero."""

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().sigmoid()


class Factored(Router):
    """Like DeepSeek's, whose weights sum to a factor, but without telling it."""

    def finish(self, weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return 1.02 * weights


class Smoothed(Router):
    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return 0.98 * super().scores(logits) + 0.02 / logits.shape[-1]


class Tempered(Router):
    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits.float() / 1.1).softmax(-1)


class Capped(Router):
    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return (5 * (logits.float() / 5).tanh()).softmax(-1)


class Smallest(Router):
    """Takes the least likely, with their shares."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, _, _ = super().forward(hidden_states)
        weights, experts = self.scores(logits).topk(self.top_k, dim=-1, largest=False)
        return logits, weights / weights.sum(-1, keepdim=True), experts


class ShareAsLogits(Router):
    """Answers the shares where others answer logits."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, experts = super().forward(hidden_states)
        return self.scores(logits).to(logits.dtype), weights, experts


class Short(Router):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        return super().forward(hidden_states)[:2]


class Scattered(Router):
    """Weights for all experts, zero for those not chosen."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, experts = super().forward(hidden_states)
        return logits, torch.zeros_like(logits, dtype=torch.float32).scatter(1, experts, weights), experts


class InGroups(Router):
    """As DeepSeek-V3's and GLM's: logits in fp32, corrected scores for the choice, and only some groups."""

    def __init__(self, experts: int = 8, width: int = 64, top_k: int = 2, bias: bool = False) -> None:
        super().__init__(experts, width, top_k, bias)
        self.num_group, self.topk_group, self.routed_scaling_factor = 4, 2, 2.5
        self.norm_topk_prob = True
        self.top_k = min(top_k, experts // 2)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def best(self, groups: torch.Tensor) -> torch.Tensor:
        return groups.topk(2, dim=-1).values.sum(-1)

    def corrected(self, scores: torch.Tensor) -> torch.Tensor:
        correction: Any = self.e_score_correction_bias
        return scores + correction

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bias = None if self.bias is None else self.bias.float()
        flat = hidden_states.reshape(-1, self.weight.shape[1])
        logits = F.linear(flat.float(), self.weight.float(), bias)
        scores = self.scores(logits)
        groups = self.corrected(scores).unflatten(-1, (self.num_group, -1))
        kept = self.best(groups).topk(self.topk_group, sorted=False).indices
        left_out = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
        ranked = groups.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
        experts = ranked.topk(self.top_k, sorted=False).indices
        weights = scores.gather(1, experts)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, experts


class InGroupsBySigmoid(InGroups):
    scores = Sigmoid.scores


class InGroupsByTheBest(InGroups):
    """As DeepSeek-V2's."""

    def best(self, groups: torch.Tensor) -> torch.Tensor:
        return groups.amax(-1)


class Uncorrected(InGroupsBySigmoid):
    """Has a correction, and leaves it out."""

    def corrected(self, scores: torch.Tensor) -> torch.Tensor:
        return scores


class WeighedByCorrected(InGroupsBySigmoid):
    """Weighs experts as it chooses them."""

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        correction: Any = self.e_score_correction_bias
        return logits.sigmoid() + correction


class FilledWithZeros(InGroupsBySigmoid):
    """As A.X-K2's: what is outside of the groups comes before corrected scores below zero."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, _, _ = super().forward(hidden_states)
        scores = self.scores(logits)
        groups = self.corrected(scores).unflatten(-1, (self.num_group, -1))
        kept = self.best(groups).topk(self.topk_group, sorted=False).indices
        left_out = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
        experts = groups.masked_fill(left_out[..., None], 0).flatten(-2).topk(self.top_k).indices
        weights = scores.gather(1, experts)
        return logits, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, experts


class Lifted(Sigmoid):
    """As LFM2's, whose sum is never small."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, _, experts = super().forward(hidden_states)
        weights = logits.float().sigmoid().gather(1, experts)
        return logits, weights / (weights.sum(-1, keepdim=True) + 1e-6), experts


class InGroupsByTheSecond(InGroupsBySigmoid):
    def best(self, groups: torch.Tensor) -> torch.Tensor:
        return groups.topk(2, dim=-1).values[..., 1]


GROUPED: tuple[type[Router], ...] = (InGroups, InGroupsBySigmoid, InGroupsByTheBest)
SAME: tuple[type[Router], ...] = (Router, Unnormalized, InItsDtype)
OTHER = (
    *(Sigmoid, FilledWithZeros, Lifted, Uncorrected, WeighedByCorrected, InGroupsByTheSecond, Factored),
    *(Smoothed, Tempered, Capped, Smallest, ShareAsLogits, Short, Scattered),
)


def taken(router: nn.Module) -> bool:
    """Whether it is taken, as a part of a model."""
    model = nn.ModuleList([router])
    use_native_routers(model)
    return "_native_router" in vars(model[0])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for each call of the library."""
    made: list[Any] = []
    plain = NativeRouter.__call__

    def noted(self: NativeRouter, x: torch.Tensor) -> Any:
        made.append(x)
        return plain(self, x)

    monkeypatch.setattr(NativeRouter, "__call__", noted)
    return made


def token(dtype: torch.dtype = torch.float32, width: int = 64, seed: int = 0) -> torch.Tensor:
    return (torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / 8).to(dtype)


def same(got: Any, want: Any) -> bool:
    """Answers of two routers, whose logits may be off by a rounding, of fp32 as sums in another order are."""
    eps = torch.finfo(want[0].dtype).eps
    off = eps * (16 if want[0].dtype is torch.float32 else 2)
    return (
        all(a.dtype is b.dtype and a.shape == b.shape for a, b in zip(got, want, strict=True))
        and torch.allclose(got[0], want[0], rtol=off, atol=off)
        and torch.allclose(got[1], want[1], rtol=10 * eps, atol=1e-6)
        and torch.equal(got[2], want[2])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [*SAME, *GROUPED, *OTHER])
def test_only_what_chooses_the_same_is_taken(cls: type[Router], dtype: torch.dtype) -> None:
    for sizes in ((8, 64, 2), (64, 256, 8), (128, 2048, 8)):
        for bias in (False, True):
            assert taken(cls(*sizes, bias=bias).to(dtype)) == (cls in SAME + GROUPED), (sizes, bias)


class OfTheClass(Router):
    """Its top_k is the class's."""

    top_k = 2

    def __init__(self) -> None:
        super().__init__()
        del self.__dict__["top_k"]


class InTheInputsDtype(InGroupsBySigmoid):
    """As Ernie's."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, experts = super().forward(hidden_states)
        return logits, weights.to(hidden_states.dtype), experts


@torch.no_grad()
def test_weights_have_the_dtype_that_the_module_gives_them() -> None:
    plain, router = InTheInputsDtype(), InTheInputsDtype()
    assert taken(router)
    for dtype in DTYPES:
        assert router(token(dtype))[1].dtype is plain(token(dtype))[1].dtype is dtype


@torch.no_grad()
def test_scores_that_are_all_zero_give_weights_of_zero() -> None:
    router = InGroupsBySigmoid()
    assert taken(router)
    router.weight.copy_(router.weight.abs() + 0.5)
    weights = router(torch.full((1, 64), -5.0))[1]
    assert weights.tolist() == [[0.0, 0.0]]


def test_what_is_built_otherwise_is_not_taken() -> None:
    assert not taken(OfTheClass())
    with_buffer, with_child, with_parameter = Router(), Router(), Router()
    with_buffer.register_buffer("correction", torch.zeros(8))
    with_child.norm = nn.LayerNorm(64)
    with_parameter.scale = nn.Parameter(torch.ones(1), requires_grad=False)
    apart, wide = Router(), Router(bias=True)
    apart.weight = nn.Parameter(torch.randn(64, 8).T, requires_grad=False)
    wide.bias = nn.Parameter(torch.randn(1), requires_grad=False)
    for router in (with_buffer, with_child, with_parameter, apart, wide, Router().double()):
        assert not taken(router)
    assert not taken(Router(top_k=9))
    assert taken(Router(top_k=8))


def in_order(answer: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """With the chosen in the order of their numbers."""
    logits, weights, experts = answer
    order = experts.argsort(-1)
    return logits, weights.gather(1, order), experts.gather(1, order)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", GROUPED)
def test_those_with_groups_answer_as_the_original(
    calls: list[Any], cls: type[InGroups], dtype: torch.dtype
) -> None:
    """Whatever the dtypes of weights and corrections are, and whatever changes."""
    plain = cls(64, 256, 8).to(dtype)
    router = copy.deepcopy(plain)
    assert taken(router)

    def agree(count: int, of: torch.dtype = dtype) -> None:
        calls.clear()
        for seed in range(20):
            x = token(of, width=256, seed=seed)
            got, want = in_order(router(x)), in_order(plain(x))
            assert all(a.dtype is b.dtype for a, b in zip(got, want, strict=True))
            assert torch.equal(got[2], want[2])
            assert torch.allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
            assert torch.allclose(got[1], want[1], rtol=2e-5)
        assert len(calls) == count

    agree(20)
    correction = torch.randn(64, generator=torch.Generator().manual_seed(3)) / 4
    for module in (plain, router):
        module.e_score_correction_bias = correction.to(dtype).clone()
    agree(20)
    for module in (plain, router):
        module.e_score_correction_bias.copy_(-correction)
    agree(20)
    for module in (plain, router):
        module.e_score_correction_bias = correction.clone()
    agree(20)
    if dtype is torch.float32:
        agree(20, torch.bfloat16)  # inputs of another dtype than the weights
    for module in (plain, router):
        module.e_score_correction_bias.fill_(-3)  # below what any score makes up for
    agree(20)
    for name, other in (("topk_group", 3), ("routed_scaling_factor", 1.0), ("norm_topk_prob", False)):
        kept = getattr(plain, name)
        for module in (plain, router):
            setattr(module, name, other)
        agree(0)
        for module in (plain, router):
            setattr(module, name, kept)
    agree(20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", SAME)
def test_answers_as_the_original(calls: list[Any], cls: type[Router], dtype: torch.dtype) -> None:
    for bias in (False, True):
        plain = cls(bias=bias).to(dtype)
        router = copy.deepcopy(plain)
        assert taken(router)
        assert isinstance(router, cls)
        assert list(router.state_dict()) == list(plain.state_dict())
        calls.clear()
        with torch.no_grad():
            for seed in range(20):
                x = token(dtype, seed=seed)
                assert same(router(x), plain(x))
                assert same(router(x[None]), plain(x[None]))
        assert len(calls) == 40


@torch.no_grad()
def test_each_of_few_tokens_has_the_choice_that_it_has_alone(calls: list[Any]) -> None:
    router = Router()
    assert taken(router)
    tokens = [token(seed=seed) for seed in range(FEW_TOKENS)]
    alone = [router(one) for one in tokens]
    calls.clear()
    together = router(torch.cat(tokens))
    assert len(calls) == 1
    assert all(map(torch.equal, together, map(torch.cat, zip(*alone, strict=True))))


def test_all_else_is_left_to_the_original(calls: list[Any]) -> None:
    plain = Router()
    router = copy.deepcopy(plain)
    assert taken(router)
    calls.clear()

    def agree(x: torch.Tensor) -> bool:
        return all(torch.equal(a, b) for a, b in zip(router(x), plain(x), strict=True))

    assert agree(token())  # gradients are on
    x = token().requires_grad_()
    router(x)[1].square().sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert agree(torch.cat([token(seed=seed) for seed in range(FEW_TOKENS + 1)]))
        assert agree(torch.cat([token(), token(seed=1)])[None])
        assert agree(torch.empty(0, 64))
        with torch.autocast("cpu", torch.bfloat16):
            assert agree(token())
        with pytest.raises(RuntimeError):
            router(token(torch.bfloat16))
        with pytest.raises(TypeError):
            router(token(), 1)
    assert not calls


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5)), requires_grad=False)


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "in place": (lambda router: router.weight.mul_(-1), True),
    "a new weight": (lambda router: setattr(router, "weight", parameter(8, 64)), True),
    "more experts": (lambda router: setattr(router, "weight", parameter(9, 64)), False),
    "new data": (lambda router: setattr(router.weight, "data", torch.randn(8, 64)), True),
    "a new bias": (lambda router: setattr(router, "bias", parameter(8)), True),
    "no bias": (lambda router: setattr(router, "bias", None), True),
    "numbers apart": (lambda router: setattr(router.weight, "data", parameter(64, 8).T), False),
    "another dtype": (lambda router: router.bfloat16(), True),
    "another choice": (lambda router: setattr(router, "top_k", 3), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_are_noticed(calls: list[Any], name: str) -> None:
    change, stays = CHANGES[name]
    plain, router = Router(bias=True), Router(bias=True)
    assert taken(router)
    with torch.no_grad():
        before = router(token())[0]
        for module in (plain, router):
            torch.manual_seed(0)
            if name == "more experts":
                module.bias = None
            change(module)
        calls.clear()
        x = token(plain.weight.dtype)
        assert same(router(x), plain(x))
        assert name == "another choice" or not torch.equal(router(x)[0], before)
    assert bool(calls) == stays or name == "more experts"


def test_hooks_see_its_calls(calls: list[Any]) -> None:
    router, seen = Router(), []
    assert taken(router)
    router.register_forward_hook(lambda module, args, output: seen.append(output[2].tolist()))
    calls.clear()
    with torch.no_grad():
        ids = router(token())[2]
    assert seen == [ids.tolist()]
    assert len(calls) == 1


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_have_weights_of_their_own(calls: list[Any], how: str) -> None:
    router = Router()
    assert taken(router)
    with torch.no_grad():
        want = router(token())
        other = copy.deepcopy(router) if how == "copy" else pickle.loads(pickle.dumps(router))
        assert type(other) is type(router)
        calls.clear()
        assert same(other(token()), want)
        other.weight.mul_(-1)
        assert not torch.equal(other(token())[2], want[2])
        assert same(router(token()), want)
        assert len(calls) == 3
