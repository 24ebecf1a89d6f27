"""Gated feed-forward parts that run in one call of the C++ library: which are taken, and what they give."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe_local.offload.dense.linear import QuantizedLinear, use_native_linears
from moe_local.offload.dense.token_mlp import TokenMlp, use_token_mlps
from moe_local.offload.native.library import library
from support import tiny_models

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

FAMILIES = {
    "qwen2_moe": 3,
    "deepseek_v3": 3,
    "glm4_moe_lite": 3,
    "qwen3_5_moe": 4,
    "mixtral": 0,
    "gpt_oss": 0,
}
"""By model type: how many such parts it has, shared experts and layers without experts among them."""


def parts(hf: Any) -> list[Any]:
    return [module for module in hf.modules() if hasattr(module, "gate_proj")]


def are_taken(hf: Any) -> list[bool]:
    return ["_token_mlp" in vars(module) for module in parts(hf)]


def model(family: str = "deepseek_v3", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    hf = tiny_models.tiny_model(family, **config).to(dtype).requires_grad_(False).eval()
    use_native_linears(hf)
    return hf


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the library has had."""
    made: list[int] = []
    plain = TokenMlp.__call__

    def noted(self: Any, x: torch.Tensor) -> torch.Tensor:
        made.append(x.numel() // x.shape[-1])
        return plain(self, x)

    monkeypatch.setattr(TokenMlp, "__call__", noted)
    return made


def tokens_for(hf: Any, count: int, seed: int = 0) -> torch.Tensor:
    first: Any = parts(hf)[0].gate_proj
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, first.in_features, generator=generator).to(hf.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_answer_as_before(family: str, dtype: torch.dtype, calls: list[int]) -> None:
    hf = model(family, dtype)
    plain = copy.deepcopy(hf)
    use_token_mlps(hf)
    assert are_taken(hf) == [True] * FAMILIES[family]
    for mine, theirs in zip(parts(hf), parts(plain), strict=True):
        assert isinstance(mine, type(theirs))
        x = tokens_for(hf, 3)
        calls.clear()
        with torch.no_grad():
            got, want = mine(x), theirs(x)
        assert calls == [3]
        assert got.dtype is dtype
        torch.testing.assert_close(
            got, want, rtol=0, atol=4 * torch.finfo(dtype).eps * float(want.abs().max())
        )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"])
def test_activations(activation: str, calls: list[int]) -> None:
    hf = model(hidden_act=activation)
    plain = copy.deepcopy(hf)
    use_token_mlps(hf)
    assert all(are_taken(hf))
    x = 3 * tokens_for(hf, 1)
    calls.clear()
    with torch.no_grad():
        for mine, theirs in zip(parts(hf), parts(plain), strict=True):
            torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert calls == [1] * len(parts(hf))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantized_ones_have_the_bits_of_single_tokens(format: str, calls: list[int]) -> None:
    hf = model()
    for module in parts(hf):
        for name in ("gate_proj", "up_proj", "down_proj"):
            plain = getattr(module, name)
            made = QuantizedLinear(nn.Linear(plain.in_features, plain.out_features, bias=False), format)
            made.weight = made.quantized("weight", plain.weight)
            setattr(module, name, made.eval())
    separate = copy.deepcopy(hf)
    use_token_mlps(hf)
    assert all(are_taken(hf))
    x = tokens_for(hf, 4)
    calls.clear()
    with torch.no_grad():
        for mine, theirs in zip(parts(hf), parts(separate), strict=True):
            got = mine(x)
            assert torch.equal(got, torch.cat([mine(token) for token in x.split(1)]))
            torch.testing.assert_close(got, theirs(x), rtol=0, atol=1e-4 * float(got.abs().max()))
    assert calls == [4, 1, 1, 1, 1] * len(parts(hf))


def test_plain_matrices_keep_their_activations(calls: list[int]) -> None:
    """Which a quantized one beside them rounds to 8 bits."""
    for activations, taken in (("native", True), ("int8", False)):
        hf = model()
        for module in parts(hf):
            for name in ("gate_proj", "up_proj"):
                plain = getattr(module, name)
                linear = nn.Linear(plain.in_features, plain.out_features, bias=False)
                made = QuantizedLinear(linear, "int8", activations)
                made.weight = made.quantized("weight", plain.weight)
                setattr(module, name, made.eval())
        use_token_mlps(hf)
        assert are_taken(hf) == [taken] * len(parts(hf))


def other_forward(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def apply(module: Any) -> None:
        cls: Any = type(module)
        module.__class__ = type("Other", (cls,), {"forward": change})

    return apply


DIFFERENT: dict[str, Callable[[Any], Any]] = {
    "a multiplied output": other_forward(
        lambda self, x: 1.2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    ),
    "gate and up the other way round": other_forward(
        lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
    ),
    "a clamped gate": other_forward(
        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))
    ),
    "no gate": other_forward(lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)))),
    "another part": lambda module: module.add_module("norm", nn.Identity()),
    "a weight of its own": lambda module: module.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "an activation that nobody knows": lambda module: setattr(module, "act_fn", nn.Softsign()),
    "matrices that do not fit": lambda module: setattr(module, "down_proj", nn.Linear(3, 64)),
}


@pytest.mark.parametrize("different", DIFFERENT)
def test_others_are_left_alone(different: str) -> None:
    hf = model()
    odd = parts(hf)[1]
    DIFFERENT[different](odd)
    if different == "matrices that do not fit":  # which cannot be called
        odd.forward = lambda x: x
    use_token_mlps(hf)
    assert are_taken(hf) == [True, False, True]


def hooked(module: Any) -> None:
    module.up_proj.register_forward_hook(lambda *_: None)


LEFT: dict[str, Callable[[Any], Any]] = {
    "a hook on a part": hooked,
    "training": lambda module: module.train(),
    "another activation": lambda module: setattr(module, "act_fn", nn.Identity()),
    "another matrix": lambda module: setattr(module, "up_proj", nn.Linear(64, 32, bias=False)),
    "a forward in a part's place": lambda module: setattr(module.up_proj, "forward", lambda x: x @ x.mT),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_happens_to_one_is_noticed(left: str, calls: list[int]) -> None:
    hf = model()
    use_token_mlps(hf)
    module = parts(hf)[1]
    x = tokens_for(hf, 1)
    with torch.no_grad():
        module(x)
        calls.clear()
        LEFT[left](module)
        with contextlib.suppress(RuntimeError):  # of the module itself, whose parts no longer fit
            module(x)
    assert calls == []


def test_other_calls_are_the_modules_own(calls: list[int]) -> None:
    hf = model()
    use_token_mlps(hf)
    module = parts(hf)[0]
    calls.clear()
    with torch.no_grad():
        module(tokens_for(hf, 5))  # many of plain weights, for which torch is faster
        module(tokens_for(hf, 3).T.contiguous().T)
        module(tokens_for(hf, 1).double().float()[:0])
        module(x=tokens_for(hf, 1))
        with torch.autocast("cpu", torch.bfloat16):
            module(tokens_for(hf, 1))
    module(tokens_for(hf, 1).requires_grad_()).sum().backward()
    assert calls == []
    with torch.no_grad():
        module(tokens_for(hf, 4).view(2, 2, -1))
    assert calls == [4]


def test_copies_read_their_own_weights(calls: list[int]) -> None:
    hf = model()
    use_token_mlps(hf)
    module, x = parts(hf)[1], tokens_for(hf, 1)
    with torch.no_grad():
        want = module(x)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            calls.clear()
            assert torch.equal(copied(x), want)
            copied.down_proj.weight.mul_(2)
            assert torch.equal(copied(x), 2 * want)
            assert calls == [1, 1]
        assert torch.equal(module(x), want)
