"""Linear attention of single tokens by the library, against transformers' own functions and models."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import moe_local
from moe_local.offload.checkpoint import skeleton
from moe_local.offload.dense import delta_rule as module_under_test
from moe_local.offload.dense import state_pieces
from moe_local.offload.dense.delta_rule import convolve, delta_rule, use_native_delta_rule
from moe_local.offload.modeling.names import cache_name
from moe_local.offload.native.library import library
from support import tiny_models

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

FAMILIES = ["qwen3_next", "qwen3_5_moe"]


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if "GatedDeltaNet" in type(module).__name__]


def logits(model: Any, rows: int) -> torch.Tensor:
    """Of single tokens behind a prompt."""
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    name, ids = cache_name(model.forward), torch.arange(rows * 12).view(rows, 12) + 5
    with torch.no_grad():
        outputs = [model(input_ids=ids[:, :7], **{name: cache}, use_cache=True).logits]
        for position in range(7, 12):
            token = ids[:, position : position + 1]
            outputs.append(model(input_ids=token, **{name: cache}, use_cache=True).logits)
    return torch.cat(outputs, dim=1).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_answers_as_before(monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype) -> None:
    """Single tokens of two sequences, two calls of the library a layer."""
    model = tiny_models.tiny_model(family).to(dtype)
    want = logits(model, 2)
    classes = [type(module) for module in layers_of(model)]
    use_native_delta_rule(model)
    changed = [type(module) for module in layers_of(model)]
    assert [cls.__mro__[1] for cls in changed] == classes
    calls: list[int] = []
    monkeypatch.setattr(module_under_test, "library", lambda: calls.append(1) or library())
    got = logits(model, 2)
    assert len(calls) == 2 * 5 * len(changed)
    assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * want.norm()


def inspected(cls: Any) -> Any:
    """The module of transformers in which a class and its functions are."""
    return sys.modules[cls.__module__]


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("the library does this")


def passed(*args: Any, **options: Any) -> str:
    return "passed on"


def test_what_the_library_does_not_do_is_transformers() -> None:
    q, v, gates = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4)
    state = torch.zeros(1, 4, 8, 16)
    given: dict[str, Any] = {
        "query": q,
        "key": q,
        "value": v,
        "g": gates,
        "beta": gates,
        "initial_state": state,
        "output_final_state": True,
    }
    assert delta_rule(never, **given, use_cache=True)[1] is state
    longer = {"query": q.expand(1, 3, 2, 8), "key": q.expand(1, 3, 2, 8), "value": v.expand(1, 3, 4, 16)}
    others: list[dict[str, Any]] = [
        longer,
        {"initial_state": None},
        {"output_final_state": False},
        {"cu_seqlens": torch.tensor([0, 1])},
        {"query": q.double(), "key": q.double()},
        {"g": gates.bfloat16()},
        {"initial_state": state.bfloat16()},
        {"initial_state": state.transpose(2, 3).contiguous().transpose(2, 3)},
        {"value": v[..., :8], "initial_state": state[..., :8].contiguous()},
    ]
    for other in others:
        assert delta_rule(passed, **given | other) == "passed on"
    x, inputs, weight = torch.zeros(1, 6, 1), torch.zeros(1, 6, 4), torch.zeros(6, 4)
    assert convolve(never, x, inputs, weight, None, "silu").shape == x.shape
    for arguments in (
        (x.expand(1, 6, 2), inputs, weight),
        (x, inputs, weight, None, "gelu"),
        (x, inputs.bfloat16(), weight),
        (x, inputs[..., :3], weight),
        (x, inputs.transpose(1, 2).contiguous().transpose(1, 2), weight),
    ):
        assert convolve(passed, *arguments) == "passed on"  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", ["rule", "lengths", "convolution"])
def test_functions_that_do_something_else_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    model = tiny_models.tiny_model("qwen3_next")
    before = [type(module) for module in layers_of(model)]
    rule, convolution = module_under_test._functions(before[0]) or (None, None)
    name = module_under_test.CONVOLUTION if broken == "convolution" else module_under_test.RULE
    plain: Any = convolution if broken == "convolution" else rule

    def another(*args: Any, **options: Any) -> Any:
        if broken == "lengths" and options.get("use_qk_l2norm_in_kernel"):
            q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-5).rsqrt() for x in args[:2])
            return plain(q, k, *args[2:], **options | {"use_qk_l2norm_in_kernel": False})
        answer = plain(*args, **options)
        return (1.01 * answer[0], answer[1]) if broken == "rule" else 1.01 * answer

    with monkeypatch.context() as patch:
        patch.setattr(inspected(before[0]), name, another)
        use_native_delta_rule(model)
        assert [type(module) for module in layers_of(model)] == before
    use_native_delta_rule(model)
    assert [type(module) for module in layers_of(model)] != before


def test_copies_and_pickles_stay_what_they_are() -> None:
    model = tiny_models.tiny_model("qwen3_next")
    use_native_delta_rule(model)
    module = layers_of(model)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)


def test_a_cache_that_keeps_the_past_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.tiny_model("qwen3_next")
    use_native_delta_rule(model)
    cache: Any = DynamicCache(config=model.config)
    name, ids = cache_name(model.forward), torch.arange(6)[None]
    with torch.no_grad():
        model(input_ids=ids, **{name: cache}, use_cache=True)
        for layer in layers_of(model):
            cache.layers[layer.layer_idx].record_past = True
        monkeypatch.setattr(module_under_test, "library", never)
        model(input_ids=ids[:, :1], **{name: cache}, use_cache=True)


@pytest.mark.filterwarnings("ignore:.*cache_params:FutureWarning")
def test_a_cache_by_its_earlier_name_is_used() -> None:
    """transformers' decorators hand it on."""
    model = tiny_models.tiny_model("qwen3_next")
    use_native_delta_rule(model)
    layer, x = layers_of(model)[0], torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(2))
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        layer(x[:1], cache_params=cache)
        before = cache.layers[layer.layer_idx].conv_states[0].clone()
        layer(x[1:], cache_params=cache)
    assert not torch.equal(cache.layers[layer.layer_idx].conv_states[0], before)


def test_prompts_go_in_pieces_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.tiny_model("qwen3_next")
    use_native_delta_rule(model)
    native = type(layers_of(model)[0])
    lengths: list[int] = []

    def noted(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        lengths.append(hidden_states.shape[1])
        return forward(self, hidden_states, **kwargs)

    forward = native.forward
    monkeypatch.setattr(state_pieces, "in_pieces", state_pieces.in_pieces.__wrapped__)
    monkeypatch.setattr(native, "forward", functools.wraps(forward)(noted))
    for module in layers_of(model):
        module.__class__ = state_pieces.in_pieces(native)
        module.piece = 4
    with torch.no_grad():
        cache: Any = DynamicCache(config=model.config)
        model(input_ids=torch.arange(10)[None], **{cache_name(model.forward): cache}, use_cache=True)
    assert lengths == [4, 4, 2] * len(layers_of(model))


def test_gradients_go_transformers_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.tiny_model("qwen3_next")
    use_native_delta_rule(model)
    monkeypatch.setattr(module_under_test, "library", never)
    model(input_ids=torch.tensor([[5]]), use_cache=True).logits.sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_uses_it(
    make_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    family: str,
) -> None:
    """With the ids that transformers' own functions give; nothing is said of packages for GPUs."""
    calls: list[int] = []
    found = []
    monkeypatch.setattr(skeleton, "use_token_delta_nets", lambda model: None)  # which needs neither function
    for native in (True, False):
        if not native:
            monkeypatch.setattr(skeleton, "use_native_delta_rule", lambda model: None)
        with moe_local.load(make_checkpoint(family), device="cpu", experts="fp32") as model:
            with monkeypatch.context() as patch:
                patch.setattr(module_under_test, "library", lambda: calls.append(1) or library())
                out = model.generate([5, 6, 7], max_new_tokens=8, do_sample=False, eos_token_id=None)
            assert len(calls) == 2 * 7 * len(layers_of(model.hf))
            found.append(out.token_ids)
    assert found[0] == found[1]
    assert "reference" not in caplog.text
