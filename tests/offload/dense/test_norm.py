"""Norms that run in the C++ library: which are taken, and what is left to the original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from moe_local.offload.dense import norm as norms
from moe_local.offload.dense.norm import TRIAL_TOKENS, use_native_norms
from moe_local.offload.native.library import DTYPES, library

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for each call of the library."""
    made: list[Any] = []
    plain = norms.native_norm

    def noted(*args: Any) -> torch.Tensor:
        made.append(args)
        return plain(*args)

    monkeypatch.setattr(norms, "native_norm", noted)
    return made


def filled(norm: Any) -> Any:
    """With weights that are not all ones."""
    with torch.no_grad():
        noise = torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(1))
        norm.weight.add_(0.3 * noise)
    return norm.requires_grad_(False)


def taken(norm: Any) -> bool:
    """Whether it is taken, as a part of a model."""
    model = nn.ModuleList([norm])
    use_native_norms(model)
    return "_norm_kind" in vars(model[0])


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


class DetailRMSNorm(MixtralRMSNorm):  # type: ignore[misc]
    """MixtralRMSNorm, written out for subclasses to differ in a detail."""

    def forward(self, hidden_states: Any) -> Any:
        x = hidden_states.float()
        return (self.weight * self.quotient(x).to(hidden_states.dtype)).to(hidden_states.dtype)

    def quotient(self, x: Any) -> Any:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class EpsilonOutsideRMSNorm(DetailRMSNorm):
    def quotient(self, x: Any) -> Any:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class LargestEpsilonRMSNorm(DetailRMSNorm):
    def quotient(self, x: Any) -> Any:
        return x * x.pow(2).mean(-1, keepdim=True).clamp_min(self.variance_epsilon).rsqrt()


class CenteredRMSNorm(DetailRMSNorm):
    def quotient(self, x: Any) -> Any:
        return super().quotient(x - x.mean(-1, keepdim=True))


class HalfRMSNorm(DetailRMSNorm):
    def quotient(self, x: Any) -> Any:
        half = x[..., : x.shape[-1] // 2]
        return x * (half.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class BoundedRMSNorm(DetailRMSNorm):
    def quotient(self, x: Any) -> Any:
        return super().quotient(x).clamp(-2, 2)


class ScaledRMSNorm(DetailRMSNorm):
    def quotient(self, x: Any) -> Any:
        return super().quotient(x) * 1.03


class PairRMSNorm(DetailRMSNorm):
    def forward(self, hidden_states: Any) -> Any:
        return super().forward(hidden_states), None


class BiasedRMSNorm(DetailRMSNorm):
    def forward(self, hidden_states: Any) -> Any:
        return super().forward(hidden_states) + 0.01


class HalfShiftedRMSNorm(GemmaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return (self._norm(x.float()) * (0.5 + self.weight.float())).type_as(x)


SHIFTED = (GemmaRMSNorm, Qwen3NextRMSNorm)
SAME = (MixtralRMSNorm, GptOssRMSNorm, DetailRMSNorm, *SHIFTED)
OTHER = (
    *(EpsilonOutsideRMSNorm, LargestEpsilonRMSNorm, CenteredRMSNorm, HalfRMSNorm, BoundedRMSNorm),
    *(ScaledRMSNorm, PairRMSNorm, BiasedRMSNorm, HalfShiftedRMSNorm, Qwen3NextRMSNormGated),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [*SAME, *OTHER])
def test_only_what_computes_the_same_is_taken(cls: Any, dtype: torch.dtype) -> None:
    for width in (16, 64, 4096):
        assert taken(filled(cls(width, 1e-5)).to(dtype)) == (cls in SAME), width


def test_what_the_library_cannot_read_is_not_taken() -> None:
    norm = filled(MixtralRMSNorm(64, 1e-5))
    assert not taken(copy.deepcopy(norm).double())
    assert not taken(copy.deepcopy(norm).to("meta"))
    apart = copy.deepcopy(norm)
    apart.weight = nn.Parameter(torch.ones(64, 2)[:, 0], requires_grad=False)
    assert not taken(apart)
    assert not taken(nn.LayerNorm(64))
    assert taken(norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [MixtralRMSNorm, *SHIFTED])
def test_answers_as_the_original(calls: list[Any], cls: Any, dtype: torch.dtype) -> None:
    plain = filled(cls(64, 1e-5)).to(dtype)
    norm = copy.deepcopy(plain)
    assert taken(norm)
    assert isinstance(norm, cls)
    assert norm._norm_kind.shifted == (cls in SHIFTED)
    assert list(norm.state_dict()) == ["weight"]
    calls.clear()
    shapes = ((64,), (1, 64), (1, 1, 64), (2, 3, 64), (TRIAL_TOKENS + 1, 64), (1, 4, 1, 64), (2, 3000, 64))
    with torch.no_grad():
        for shape in shapes:
            x = numbers(*shape, dtype=dtype)
            got, want = norm(x), plain(x)
            assert got.dtype is dtype
            assert torch.allclose(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
        for x in (numbers(64, 3, dtype=dtype).T, numbers(2, 500, 80, dtype=dtype)[:, 1:, 9:73]):
            assert torch.allclose(norm(x), plain(x), rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    assert len(calls) == len(shapes) + 2


def test_all_else_is_left_to_the_original(calls: list[Any]) -> None:
    plain = filled(MixtralRMSNorm(64, 1e-5))
    norm = copy.deepcopy(plain)
    assert taken(norm)
    calls.clear()
    with torch.no_grad():
        for x in (numbers(1, 64).bfloat16(), numbers(1, 64).double()):
            assert torch.equal(norm(x), plain(x))
        for x in (numbers(2, 1), numbers(2, 64, 1)):  # torch stretches them
            assert torch.equal(norm(x), plain(x))
        for width in (32, 128):
            with pytest.raises(RuntimeError, match="size of tensor"):
                norm(numbers(1, width))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(numbers(1, 64)), plain(numbers(1, 64)))
        with pytest.raises(TypeError):
            norm(numbers(1, 64), 3)
    x, again = numbers(1, 64).requires_grad_(), numbers(1, 64).requires_grad_()
    norm(x).sum().backward()
    plain(again).sum().backward()
    assert torch.equal(x.grad, again.grad)  # type: ignore[arg-type]
    assert not calls


def test_hooks_see_its_calls(calls: list[Any]) -> None:
    norm = filled(MixtralRMSNorm(64, 1e-5))
    assert taken(norm)
    calls.clear()
    norm.register_forward_hook(lambda module, args, output: output * 2)
    plain = filled(MixtralRMSNorm(64, 1e-5))
    with torch.no_grad():
        assert torch.allclose(norm(numbers(1, 64)), 2 * plain(numbers(1, 64)), rtol=1e-6)
    assert len(calls) == 1


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "in place": (lambda norm: norm.weight.mul_(3), True),
    "a new weight": (lambda norm: setattr(norm, "weight", nn.Parameter(numbers(64), False)), True),
    "new data": (lambda norm: setattr(norm.weight, "data", numbers(64)), True),
    "numbers apart": (lambda norm: setattr(norm.weight, "data", numbers(64, 2)[:, 0]), False),
    "another dtype": (lambda norm: norm.bfloat16(), False),
    "one number": (lambda norm: setattr(norm.weight, "data", numbers(1)), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_are_noticed(calls: list[Any], name: str) -> None:
    change, stays = CHANGES[name]
    plain, norm = filled(MixtralRMSNorm(64, 1e-5)), filled(MixtralRMSNorm(64, 1e-5))
    assert taken(norm)
    for module in (plain, norm):
        change(module)
    calls.clear()
    with torch.no_grad():
        assert torch.allclose(norm(numbers(1, 64)), plain(numbers(1, 64)), rtol=1e-6, atol=0)
    assert bool(calls) == stays


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_have_weights_of_their_own(calls: list[Any], how: str) -> None:
    norm = filled(MixtralRMSNorm(64, 1e-5))
    assert taken(norm)
    other = copy.deepcopy(norm) if how == "copy" else pickle.loads(pickle.dumps(norm))
    assert type(other) is type(norm)
    calls.clear()
    with torch.no_grad():
        want = norm(numbers(1, 64))
        assert torch.equal(other(numbers(1, 64)), want)
        other.weight.zero_()
        assert not other(numbers(1, 64)).any()
        assert torch.equal(norm(numbers(1, 64)), want)
    assert len(calls) == 4
