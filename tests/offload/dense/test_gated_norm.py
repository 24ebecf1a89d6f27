"""Gated norms that run in the C++ library: which are taken, and what is left to the original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

import moe_local
from moe_local.offload.checkpoint import skeleton
from moe_local.offload.dense import gated_norm as module_under_test
from moe_local.offload.dense.gated_norm import use_native_gated_norms
from moe_local.offload.native.library import DTYPES, library
from tests.offload.dense.test_norm import filled, numbers

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of what each call of the library norms."""
    made: list[torch.Size] = []
    plain = module_under_test.gated_norm

    def noted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        made.append(x.shape)
        return plain(x, *args)

    monkeypatch.setattr(module_under_test, "gated_norm", noted)
    return made


def taken(norm: Any) -> bool:
    """Whether it is taken, as a part of a model."""
    before = type(norm)
    use_native_gated_norms(nn.ModuleList([norm]))
    return type(norm) is not before


def gates(x: torch.Tensor) -> torch.Tensor:
    return 3 * x.flip(-1)


class DetailRMSNormGated(Qwen3NextRMSNormGated):  # type: ignore[misc]
    """Qwen3NextRMSNormGated, written out for subclasses to differ in a detail."""

    def forward(self, hidden_states: Any, gate: Any = None) -> Any:
        x, opened = self.before(hidden_states.float(), gate), self.opened(gate.float())
        x = x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (self.factor() * x.to(hidden_states.dtype) * opened).to(hidden_states.dtype)

    def before(self, x: Any, gate: Any) -> Any:
        return x

    def opened(self, gate: Any) -> Any:
        return F.silu(gate)

    def factor(self) -> Any:
        return self.weight


class GateFirstRMSNormGated(DetailRMSNormGated):
    def before(self, x: Any, gate: Any) -> Any:
        return x * F.silu(gate.float())

    def opened(self, gate: Any) -> Any:
        return torch.ones_like(gate)


class CenteredRMSNormGated(DetailRMSNormGated):
    def before(self, x: Any, gate: Any) -> Any:
        return x - x.mean(-1, keepdim=True)


class SigmoidRMSNormGated(DetailRMSNormGated):
    def opened(self, gate: Any) -> Any:
        return gate.sigmoid()


class GeluRMSNormGated(DetailRMSNormGated):
    def opened(self, gate: Any) -> Any:
        return F.gelu(gate)


class BoundedRMSNormGated(DetailRMSNormGated):
    def opened(self, gate: Any) -> Any:
        return F.silu(gate).clamp(max=20)


class ShutRMSNormGated(DetailRMSNormGated):
    def opened(self, gate: Any) -> Any:
        return F.silu(gate).where(gate > 0, 0)


class ShiftedRMSNormGated(DetailRMSNormGated):
    def factor(self) -> Any:
        return 1 + self.weight


class PairRMSNormGated(DetailRMSNormGated):
    def forward(self, hidden_states: Any, gate: Any = None) -> Any:
        return super().forward(hidden_states, gate), None


class LonelyRMSNormGated(Qwen3NextRMSNormGated):  # type: ignore[misc]
    def forward(self, hidden_states: Any) -> Any:
        return hidden_states


class RoundedOnceRMSNormGated(DetailRMSNormGated):
    """Which in fp32 is the same."""

    def forward(self, hidden_states: Any, gate: Any = None) -> Any:
        float_weight, x = self.weight.float(), hidden_states.float()
        x = x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (float_weight * x * F.silu(gate.float())).to(hidden_states.dtype)


SAME = (Qwen3NextRMSNormGated, Qwen3_5MoeRMSNormGated, DetailRMSNormGated)
OTHER = (
    *(
        GateFirstRMSNormGated,
        CenteredRMSNormGated,
        SigmoidRMSNormGated,
        GeluRMSNormGated,
        BoundedRMSNormGated,
    ),
    *(ShutRMSNormGated, ShiftedRMSNormGated, PairRMSNormGated, LonelyRMSNormGated),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [*SAME, *OTHER])
def test_only_what_computes_the_same_is_taken(cls: Any, dtype: torch.dtype) -> None:
    for width in (16, 128, 4096):
        assert taken(filled(cls(width, 1e-5)).to(dtype)) == (cls in SAME), width


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_rounds_less_often_is_not_taken(dtype: torch.dtype) -> None:
    for width in (16, 128, 4096):
        norm = filled(RoundedOnceRMSNormGated(width, 1e-5)).to(dtype)
        assert taken(norm) == (dtype is torch.float32), width


def test_what_the_library_cannot_read_is_not_taken() -> None:
    norm = filled(Qwen3NextRMSNormGated(64))
    assert not taken(copy.deepcopy(norm).double())
    assert not taken(copy.deepcopy(norm).to("meta"))
    apart = copy.deepcopy(norm)
    apart.weight = nn.Parameter(torch.ones(64, 2)[:, 0], requires_grad=False)
    assert not taken(apart)
    hooked = copy.deepcopy(norm)
    hooked.forward = hooked.forward  # as accelerate's hooks do
    assert not taken(hooked)
    unknown = copy.deepcopy(norm)
    unknown.variance_epsilon = torch.tensor(1e-6)
    assert not taken(unknown)
    assert taken(norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", SAME)
def test_answers_as_the_original(calls: list[torch.Size], cls: Any, dtype: torch.dtype) -> None:
    plain = filled(cls(64, 1e-5)).to(dtype)
    norm = copy.deepcopy(plain)
    assert taken(norm)
    assert isinstance(norm, cls)
    assert list(norm.state_dict()) == ["weight"]
    calls.clear()
    inputs = [numbers(*shape, dtype=dtype) for shape in ((64,), (1, 64), (2, 3, 64), (17, 64), (2, 3000, 64))]
    inputs += [numbers(64, 3, dtype=dtype).T, numbers(2, 500, 80, dtype=dtype)[:, 1:, 9:73]]
    with torch.no_grad():
        for x in inputs:
            got, want = norm(x, gates(x)), plain(x, gates(x))
            assert got.dtype is dtype
            assert torch.allclose(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
            wide = gates(x).unsqueeze(-1).expand(*x.shape, 2)[..., 1]  # a view, whose numbers may lie apart
            assert torch.equal(norm(hidden_states=x, gate=wide), got)
        norm.variance_epsilon = plain.variance_epsilon = 0.5
        assert torch.allclose(
            norm(x, gates(x)), plain(x, gates(x)), rtol=4 * torch.finfo(dtype).eps, atol=1e-7
        )
    assert calls == [x.shape for x in inputs for _ in "ab"] + [x.shape]


def test_all_else_is_left_to_the_original(calls: list[torch.Size]) -> None:
    plain = filled(Qwen3NextRMSNormGated(64))
    norm = copy.deepcopy(plain)
    assert taken(norm)
    calls.clear()
    x = numbers(2, 64)
    with torch.no_grad():
        for given in ((x.bfloat16(), gates(x).bfloat16()), (x.double(), gates(x).double())):
            assert torch.equal(norm(*given), plain(*given))
        for gate in (gates(x).bfloat16(), gates(x)[0], gates(x)[:, :1]):  # torch stretches them
            assert torch.equal(norm(x, gate), plain(x, gate))
        stretched = numbers(2, 1)
        assert torch.equal(norm(stretched, gates(stretched)), plain(stretched, gates(stretched)))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(x, gates(x)), plain(x, gates(x)))
        with pytest.raises(RuntimeError, match="size of tensor"):
            norm(numbers(1, 32), numbers(1, 32))
        with pytest.raises(AttributeError, match="NoneType"):
            norm(x)
        with pytest.raises(TypeError):
            norm(x, gates(x), 3)
    mine, others = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(mine, gates(x)).sum().backward()
    plain(others, gates(x)).sum().backward()
    assert torch.equal(mine.grad, others.grad)  # type: ignore[arg-type]
    assert not calls


def test_hooks_see_its_calls(calls: list[torch.Size]) -> None:
    plain = filled(Qwen3NextRMSNormGated(64))
    norm, x = copy.deepcopy(plain), numbers(5, 64)
    assert taken(norm)
    calls.clear()
    norm.register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        assert torch.allclose(norm(x, gates(x)), 2 * plain(x, gates(x)), rtol=1e-6)
    assert len(calls) == 1


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "in place": (lambda norm: norm.weight.mul_(3), True),
    "a new weight": (lambda norm: setattr(norm, "weight", nn.Parameter(numbers(64), False)), True),
    "numbers apart": (lambda norm: setattr(norm.weight, "data", numbers(64, 2)[:, 0]), False),
    "another dtype": (lambda norm: norm.bfloat16(), False),
    "one number": (lambda norm: setattr(norm.weight, "data", numbers(1)), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_are_noticed(calls: list[torch.Size], name: str) -> None:
    change, stays = CHANGES[name]
    plain, norm = filled(Qwen3NextRMSNormGated(64)), filled(Qwen3NextRMSNormGated(64))
    assert taken(norm)
    for module in (plain, norm):
        change(module)
    calls.clear()
    x = numbers(5, 64)
    with torch.no_grad():
        assert torch.allclose(norm(x, gates(x)), plain(x, gates(x)), rtol=1e-6)
    assert bool(calls) == stays


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_have_weights_of_their_own(calls: list[torch.Size], how: str) -> None:
    norm, x = filled(Qwen3NextRMSNormGated(64)), numbers(5, 64)
    assert taken(norm)
    other = copy.deepcopy(norm) if how == "copy" else pickle.loads(pickle.dumps(norm))
    assert type(other) is type(norm)
    calls.clear()
    with torch.no_grad():
        want = norm(x, gates(x))
        assert torch.equal(other(x, gates(x)), want)
        other.weight.zero_()
        assert not other(x, gates(x)).any()
        assert torch.equal(norm(x, gates(x)), want)
    assert len(calls) == 4


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_a_loaded_model_uses_it_for_prompts(
    make_checkpoint: Callable[..., Path],
    calls: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """With the ids that transformers' own norms give. Some families' single tokens have one call a layer."""
    found = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(skeleton, "use_native_gated_norms", lambda model: None)
        with moe_local.load(make_checkpoint(family), device="cpu", experts="fp32") as model:
            layers = [module for module in model.hf.modules() if "GatedDeltaNet" in type(module).__name__]
            heads, width = layers[0].num_v_heads, layers[0].head_v_dim
            calls.clear()
            out = model.generate(list(range(5, 45)), max_new_tokens=8, do_sample=False, eos_token_id=None)
            assert calls[: len(layers)] == ([(40 * heads, width)] * len(layers) if native else [])
            assert set(calls[len(layers) :]) <= {(heads, width)}
            found.append(out.token_ids)
    assert found[0] == found[1]
