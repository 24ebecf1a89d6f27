"""Mamba-2's gated norms, by groups, that run in the C++ library: which are taken, and what is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

import moe_local
from moe_local.offload.checkpoint import skeleton
from moe_local.offload.dense import gated_norm as module_under_test
from moe_local.offload.dense.gated_norm import use_native_gated_norms
from moe_local.offload.native.library import DTYPES, library
from tests.offload.dense.test_norm import filled, numbers

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

Given = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of what each call of the library norms."""
    made: list[torch.Size] = []
    plain = module_under_test.open_and_norm

    def noted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        made.append(x.shape)
        return plain(x, *args)

    monkeypatch.setattr(module_under_test, "open_and_norm", noted)
    return made


def taken(norm: Any) -> bool:
    """Whether it is taken, as a part of a model."""
    before = type(norm)
    use_native_gated_norms(nn.ModuleList([norm]))
    return type(norm) is not before


def as_in_a_layer(*shape: int, dtype: torch.dtype, of_scan: torch.dtype) -> Given:
    """A scan's answers, and gates that are a part of a projection."""
    *tokens, width = shape
    projected = 3 * numbers(*tokens, 3 * width + 5, dtype=dtype)
    return numbers(*shape, dtype=of_scan), projected[..., width : 2 * width]


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    same = got.dtype is want.dtype
    return same and torch.allclose(got, want, rtol=4 * torch.finfo(got.dtype).eps, atol=1e-7)


class DetailRMSNormGated(Zamba2RMSNormGated):  # type: ignore[misc]
    """Zamba2RMSNormGated, written out for subclasses to differ in a detail."""

    def forward(self, hidden_states: Any, gate: Any = None) -> Any:
        x = self.opened(hidden_states.float(), gate.float()).unflatten(-1, (-1, self.size()))
        x = (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()).flatten(-2)
        return self.scaled(x, hidden_states.dtype)

    def size(self) -> int:
        return int(self.group_size)

    def opened(self, x: Any, gate: Any) -> Any:
        return x * F.silu(gate)

    def scaled(self, x: Any, dtype: torch.dtype) -> Any:
        return self.weight * x.to(dtype)


class HalfRMSNormGated(DetailRMSNormGated):
    def size(self) -> int:
        return int(self.group_size) // 2


class SigmoidRMSNormGated(DetailRMSNormGated):
    def opened(self, x: Any, gate: Any) -> Any:
        return x * gate.sigmoid()


class OpenRMSNormGated(DetailRMSNormGated):
    def opened(self, x: Any, gate: Any) -> Any:
        return x


class ShiftedRMSNormGated(DetailRMSNormGated):
    def scaled(self, x: Any, dtype: torch.dtype) -> Any:
        return (1 + self.weight) * x.to(dtype)


class NarrowRMSNormGated(DetailRMSNormGated):
    """Which in fp32 is the same."""

    def scaled(self, x: Any, dtype: torch.dtype) -> Any:
        return super().scaled(x, dtype).to(self.weight.dtype)


GROUPED = tuple(
    cls
    for cls in (Zamba2RMSNormGated, GraniteMoeHybridRMSNormGated, MambaRMSNormGated)
    if "group_size" in signature(cls).parameters  # older releases have no groups in some
)
SAME = (*GROUPED, DetailRMSNormGated)
OTHER = (HalfRMSNormGated, SigmoidRMSNormGated, OpenRMSNormGated, ShiftedRMSNormGated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [*SAME, *OTHER, NarrowRMSNormGated])
def test_only_what_computes_the_same_is_taken(cls: Any, dtype: torch.dtype) -> None:
    same = cls in SAME or (cls is NarrowRMSNormGated and dtype is torch.float32)
    for width, group in ((16, 16), (96, 24), (64, 8), (4096, 512)):
        assert taken(filled(cls(width, group, 1e-5)).to(dtype)) == same, width


@pytest.mark.parametrize("group", [None, -16, 24, 16.0, 128])
def test_groups_that_leave_numbers_over_are_not_taken(group: Any) -> None:
    norm = filled(Zamba2RMSNormGated(64, 16))
    norm.group_size = group
    assert not taken(norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", SAME)
def test_answers_as_the_original(calls: list[torch.Size], cls: Any, dtype: torch.dtype) -> None:
    plain = filled(cls(64, 16, 1e-5)).to(dtype)
    norm = copy.deepcopy(plain)
    assert taken(norm)
    assert isinstance(norm, cls)
    assert list(norm.state_dict()) == ["weight"]
    calls.clear()
    shapes = (64,), (1, 64), (2, 3, 64), (17, 64), (2, 1500, 64)
    with torch.no_grad():
        for of_scan in (dtype, torch.float32):
            for shape in shapes:
                given = as_in_a_layer(*shape, dtype=dtype, of_scan=of_scan)
                assert close(norm(*given), plain(*given))
        for name, value in (("variance_epsilon", 0.5), ("group_size", 32)):
            before = norm(*given)
            setattr(norm, name, value)
            assert not close(norm(*given), before)
            setattr(plain, name, value)
            assert close(norm(*given), plain(*given))
    assert len(calls) == 2 * len(shapes) + 6


def test_all_else_is_left_to_the_original(calls: list[torch.Size]) -> None:
    plain = filled(Zamba2RMSNormGated(64, 16)).bfloat16()
    norm = copy.deepcopy(plain)
    assert taken(norm)
    calls.clear()
    x, gate = as_in_a_layer(2, 64, dtype=torch.bfloat16, of_scan=torch.float32)
    with torch.no_grad():
        for given in ((x.half(), gate), (x.double(), gate), (x, gate.float()), (x, gate[0]), (x, None), (x,)):
            assert torch.equal(norm(*given), plain(*given))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(x, gate), plain(x, gate))
        with pytest.raises(TypeError):
            norm(x, gate, 3)
    mine, others = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(mine, gate).sum().backward()
    plain(others, gate).sum().backward()
    assert torch.equal(mine.grad, others.grad)  # type: ignore[arg-type]
    assert not calls


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_have_weights_of_their_own(calls: list[torch.Size], how: str) -> None:
    norm = filled(Zamba2RMSNormGated(64, 16))
    given = as_in_a_layer(5, 64, dtype=torch.float32, of_scan=torch.float32)
    assert taken(norm)
    other = copy.deepcopy(norm) if how == "copy" else pickle.loads(pickle.dumps(norm))
    assert type(other) is type(norm)
    calls.clear()
    with torch.no_grad():
        want = norm(*given)
        assert torch.equal(other(*given), want)
        other.weight.zero_()
        assert not other(*given).any()
        assert torch.equal(norm(*given), want)
    assert len(calls) == 4


@pytest.mark.parametrize("dense", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid"])
def test_a_loaded_model_uses_it_for_prompts(
    make_checkpoint: Callable[..., Path],
    calls: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dense: str,
) -> None:
    """With the ids that transformers' own norms give. Single tokens have one call a layer."""
    if family == "granitemoehybrid" and GraniteMoeHybridRMSNormGated not in GROUPED:
        pytest.skip("its norm has no groups in this release, and is left to torch")
    found = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(skeleton, "use_native_gated_norms", lambda model: None)
        with moe_local.load(make_checkpoint(family), device="cpu", experts="fp32", dense=dense) as model:
            layers = [module for module in model.hf.modules() if hasattr(module, "A_log")]
            width = len(layers[0].norm.weight)
            calls.clear()
            out = model.generate(list(range(5, 45)), max_new_tokens=8, do_sample=False, eos_token_id=None)
            assert calls[: len(layers)] == ([(1, 40, width)] * len(layers) if native else [])
            found.append(out.token_ids)
    assert found[0] == found[1]
