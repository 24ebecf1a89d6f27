"""Layers of Mamba-2 in one call of the library: which are taken, and that they answer the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

import moe_local
from moe_local.offload.dense.mamba2 import UPDATE, use_native_mamba2
from moe_local.offload.dense.token_mamba2 import TokenMamba2, use_token_mamba2
from moe_local.offload.native.library import DTYPES, library
from support import tiny_models
from support.single_tokens import one_by_one, quantize

pytestmark = [
    pytest.mark.skipif(library() is None, reason="the C++ library was not compiled"),
    pytest.mark.skipif(
        UPDATE not in GraniteMoeHybridMambaLayer.forward.__globals__,
        reason="this transformers computes them in the layer",
    ),
]

FAMILY = "granitemoehybrid"
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    (FAMILY, {}),
    ("nemotron_h", {}),
    ("nemotron_h", {"n_groups": 2, "ssm_state_size": 32}),
]
IDS = [5, 17, 300, 42, 7, 99, 260, 31]


def layers_of(hf: Any) -> list[Any]:
    return [module for module in hf.modules() if hasattr(module, "A_log")]


def are_taken(hf: Any) -> list[bool]:
    return ["_token_state_call" in vars(module) for module in layers_of(hf)]


def tiny(dtype: torch.dtype = torch.float32, family: str = FAMILY, **sizes: Any) -> Any:
    return tiny_models.tiny_model(family, **sizes).requires_grad_(False).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of the library."""
    made: list[int] = []
    plain = TokenMamba2.__call__

    def noted(self: TokenMamba2, x: torch.Tensor, *args: Any) -> torch.Tensor:
        made.append(len(x))
        return plain(self, x, *args)

    monkeypatch.setattr(TokenMamba2, "__call__", noted)
    return made


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[got.dtype]
    return bool((got - want).float().norm() <= bound * want.float().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
def test_answers_as_the_original(
    calls: list[int], family: str, sizes: dict[str, Any], dtype: torch.dtype
) -> None:
    plain, hf = tiny(dtype, family, **sizes), tiny(dtype, family, **sizes)
    use_native_mamba2(hf)
    use_token_mamba2(hf)
    assert all(are_taken(hf))
    calls.clear()
    assert close(one_by_one(hf, IDS), one_by_one(plain, IDS))
    assert calls == [1] * len(layers_of(hf)) * (len(IDS) - 1)  # the first token has no state before it


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
def test_quantized_weights_are_read_in_place(family: str, sizes: dict[str, Any], format: str) -> None:
    plain, hf = tiny(family=family, **sizes), tiny(family=family, **sizes)
    quantize(layers_of(plain), layers_of(hf), format)
    use_token_mamba2(hf)
    assert all(are_taken(hf))
    want = one_by_one(plain, IDS)
    assert (one_by_one(hf, IDS) - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("family", [FAMILY, "nemotron_h"])
def test_a_loaded_model_answers_as_transformers_own(
    make_checkpoint: Callable[..., Path], calls: list[int], family: str
) -> None:
    """One sequence, and three of several lengths together."""
    folder = make_checkpoint(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [torch.tensor([ids]) for ids in (IDS[:3], IDS, IDS[2:7])]
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None}
    with torch.inference_mode():
        want = [reference.generate(prompt, do_sample=False, **options)[0, -10:] for prompt in prompts]
    width = len(IDS)
    rows = [nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts]
    mask = torch.cat([torch.arange(width)[None] >= width - prompt.shape[1] for prompt in prompts]).long()
    with moe_local.load(folder, device="cpu", experts="fp32", dense="fp32", context=64, parallel=3) as model:
        assert all(are_taken(model.hf))
        calls.clear()
        for prompt, ids in zip(prompts, want, strict=True):
            assert torch.equal(model.generate(prompt, **options)[0, -10:], ids)
        assert set(calls) == {1}
        calls.clear()
        together = model.generate(torch.cat(rows), attention_mask=mask, **options)[:, -10:]
        assert torch.equal(together, torch.stack(want))
        assert max(calls) == 3


class Slower(GraniteMoeHybridMambaLayer):  # type: ignore[misc]
    """Its states fade at another pace."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = self.A_log.clone()
        self.A_log.sub_(1)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.A_log.copy_(kept)


class Clipped(GraniteMoeHybridMambaLayer):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states.clamp(-2, 2), *args, **kwargs)


class Doubled(GraniteMoeHybridMambaLayer):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)


@pytest.mark.parametrize("variant", [GraniteMoeHybridMambaLayer, Slower, Clipped, Doubled])
def test_what_computes_something_else_is_not_taken(variant: type[Any]) -> None:
    hf = tiny()
    for module in layers_of(hf):
        module.__class__ = variant
    use_token_mamba2(hf)
    assert are_taken(hf) == [variant is GraniteMoeHybridMambaLayer] * len(layers_of(hf))


def add_norm(module: Any) -> None:
    module.o_norm = nn.LayerNorm(64)


def add_parameter(module: Any) -> None:
    module.slopes = nn.Parameter(torch.ones(4))


def mix_dtypes(module: Any) -> None:
    module.out_proj = module.out_proj.bfloat16()


def widen_decay(module: Any) -> None:
    module.A_log = nn.Parameter(torch.zeros(1))


def change_norm(module: Any) -> None:
    module.norm = nn.Identity()


def norm_more_together(module: Any) -> None:
    module.norm.group_size //= 2


def shrink_state(module: Any) -> None:
    module.ssm_state_size = 8


CHANGED = [
    *(add_norm, add_parameter, mix_dtypes, widen_decay, change_norm, norm_more_together, shrink_state),
]


@pytest.mark.parametrize("change", CHANGED)
def test_what_is_built_otherwise_is_not_taken(change: Callable[[Any], None]) -> None:
    module = layers_of(tiny())[0]
    assert TokenMamba2.of(module, torch.float32) is not None
    assert TokenMamba2.of(module, torch.float64) is None
    change(module)
    assert TokenMamba2.of(module, torch.float32) is None


def halved(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter / 2, requires_grad=False)


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "in place": (lambda m: m.in_proj.weight.mul_(-1), True),
    "a new weight": (lambda m: setattr(m.in_proj, "weight", halved(m.in_proj.weight)), True),
    "a new decay": (lambda m: setattr(m, "A_log", halved(m.A_log)), True),
    "a new way past": (lambda m: setattr(m, "D", halved(m.D)), True),
    "a new norm's weight": (lambda m: setattr(m.norm, "weight", halved(m.norm.weight)), True),
    "a new convolution": (lambda m: setattr(m.conv1d, "weight", halved(m.conv1d.weight)), True),
    "another epsilon": (lambda m: setattr(m.norm, "variance_epsilon", 0.1), False),
    "another activation": (lambda m: setattr(m, "activation", "gelu"), False),
    "a hook": (lambda m: m.in_proj.register_forward_hook(lambda module, args, out: 2 * out), False),
    "a layer around a layer": (
        lambda m: setattr(m, "out_proj", nn.Sequential(m.out_proj, nn.Tanh())),
        False,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(calls: list[int], name: str) -> None:
    change, stays = CHANGES[name]
    plain, hf = tiny(), tiny()
    use_token_mamba2(hf)
    before = one_by_one(hf, IDS)
    for model in (plain, hf):
        change(layers_of(model)[1])
    calls.clear()
    assert close(one_by_one(hf, IDS), one_by_one(plain, IDS))
    assert len(calls) == (len(layers_of(hf)) - (not stays)) * (len(IDS) - 1)
    assert not torch.allclose(one_by_one(hf, IDS), before, atol=1e-4)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_have_weights_of_their_own(calls: list[int], how: str) -> None:
    hf = tiny()
    use_token_mamba2(hf)
    want = one_by_one(hf, IDS)
    other = copy.deepcopy(hf) if how == "copy" else pickle.loads(pickle.dumps(hf))
    calls.clear()
    assert torch.equal(one_by_one(other, IDS), want)
    assert calls
    for module in layers_of(other):
        module.in_proj.weight.mul_(-0.5)
    assert not torch.allclose(one_by_one(other, IDS), want, atol=1e-3)
    assert torch.equal(one_by_one(hf, IDS), want)
