"""Linear attention by the library, against transformers' own functions and models."""

from __future__ import annotations

import copy
import functools
import inspect
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
from moe_local.offload.dense import convolution, state_pieces
from moe_local.offload.dense import delta_rule as module_under_test
from moe_local.offload.dense.delta_rule import (
    PROMPT_CONVOLUTION,
    PROMPT_RULE,
    RULE,
    use_native_delta_rule,
)
from moe_local.offload.modeling.names import cache_name
from moe_local.offload.native.library import library, loaded_library
from support import tiny_models

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

FAMILIES = ["qwen3_next", "qwen3_5_moe"]


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if "GatedDeltaNet" in type(module).__name__]


def logits(model: Any, lengths: tuple[int, ...]) -> torch.Tensor:
    """Of two sequences, which go through the model in pieces of these lengths."""
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.randint(5, 300, (2, sum(lengths)), generator=torch.Generator().manual_seed(1))
    options = {cache_name(model.forward): cache, "use_cache": True}
    with torch.no_grad():
        outputs = [model(input_ids=piece, **options).logits for piece in ids.split(lengths, dim=1)]
    return torch.cat(outputs, dim=1).float()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each call of the library."""
    made: list[int] = []
    for module in (module_under_test, convolution):
        monkeypatch.setattr(module, "loaded_library", lambda: made.append(1) or loaded_library())
    return made


@pytest.mark.parametrize("lengths", [(7, 1, 1, 1, 1, 1), (1, 6, 1, 1), (5, 3, 1, 2, 1), (70, 65, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_answers_as_before(
    calls: list[int], family: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    """Prompts, what continues them, and single tokens: two calls of the library a layer."""
    model = tiny_models.tiny_model(family).to(dtype)
    want = logits(model, lengths)
    classes = [type(module) for module in layers_of(model)]
    use_native_delta_rule(model)
    changed = [type(module) for module in layers_of(model)]
    assert [cls.__mro__[1] for cls in changed] == classes
    calls.clear()
    got = logits(model, lengths)
    assert len(calls) == 2 * len(lengths) * len(changed)
    for mine, others in zip(got.split(lengths, dim=1), want.split(lengths, dim=1), strict=True):
        assert relative(mine, others) <= (1e-5 if dtype == torch.float32 else 0.02)


def inspected(cls: Any) -> Any:
    """The module of transformers in which a class and its functions are."""
    return sys.modules[cls.__module__]


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("the library does this")


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        *((name, "answer") for name in module_under_test.NAMES),
        *((name, "late answer") for name in (PROMPT_RULE, PROMPT_CONVOLUTION)),
        *((name, broken) for name in (RULE, PROMPT_RULE) for broken in ("lengths", "state")),
    ],
)
def test_functions_that_do_something_else_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: str
) -> None:
    """Also if it is only behind the 64th token, where q and k are normalized, or in the state they leave."""
    model = tiny_models.tiny_model("qwen3_next")
    before = [type(module) for module in layers_of(model)]
    plain: Any = getattr(inspected(before[0]), name)
    along = 1 if name in (RULE, PROMPT_RULE) else 2

    def another(*args: Any, **options: Any) -> Any:
        if broken == "lengths" and options.get("use_qk_l2norm_in_kernel"):
            q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-5).rsqrt() for x in args[:2])
            return plain(q, k, *args[2:], **options | {"use_qk_l2norm_in_kernel": False})
        found = plain(*args, **options)
        answer, state = found if along == 1 else (found, None)
        if broken == "answer":
            answer *= 1.01
        elif broken == "late answer" and answer.shape[along] > 64:
            answer.narrow(along, 64, 1).mul_(1.01)
        elif broken == "state":
            state *= 1.01
        return (answer, state) if along == 1 else answer

    with monkeypatch.context() as patch:
        patch.setattr(inspected(before[0]), name, another)
        use_native_delta_rule(model)
        assert [type(module) for module in layers_of(model)] == before
    use_native_delta_rule(model)
    assert [type(module) for module in layers_of(model)] != before


def test_a_class_without_one_of_the_functions_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module_under_test.NAMES:
        model = tiny_models.tiny_model("qwen3_next")
        before = [type(module) for module in layers_of(model)]
        with monkeypatch.context() as patch:
            patch.setattr(inspected(before[0]), name, None)
            use_native_delta_rule(model)
            assert [type(module) for module in layers_of(model)] == before


@pytest.mark.parametrize("family", FAMILIES)
def test_where_packed_sequences_start_is_for_transformers_functions(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = tiny_models.tiny_model(family)
    layer: Any = layers_of(model)[0]
    told: list[tuple[str, set[str]]] = []

    def noting(name: str) -> Callable[..., Any]:
        plain: Any = inspect.unwrap(getattr(inspected(type(layer)), name))

        def noted(*args: Any, **options: Any) -> Any:
            told.append((name, {key for key, value in options.items() if value is starts}))
            return plain(*args, **options)

        return noted

    functions = {name: noting(name) for name in module_under_test.NAMES}
    for name, function in functions.items():
        monkeypatch.setattr(inspected(type(layer)), name, function)
    layer.__class__ = module_under_test._native.__wrapped__(type(layer))
    starts, x = torch.tensor([0, 2, 6]), torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(2))
    for options, of_rule in (
        ({}, ""),
        ({"cu_seq_lens_q": starts}, "cu_seqlens"),
        ({"seq_idx": starts}, "seq_idx"),
    ):
        cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        told.clear()
        with torch.no_grad():
            layer(x, **{cache_name(type(layer).forward): cache}, **options)
        assert told == ([(PROMPT_CONVOLUTION, set(options)), (PROMPT_RULE, {of_rule})] if options else [])


def test_prompts_without_a_cache_are_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.tiny_model("qwen3_next")
    use_native_delta_rule(model)
    for module in (module_under_test, convolution):
        monkeypatch.setattr(module, "loaded_library", never)
    with torch.no_grad():
        model(input_ids=torch.arange(6)[None], use_cache=False)


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
        for module in (module_under_test, convolution):
            monkeypatch.setattr(module, "loaded_library", never)
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
    for module in (module_under_test, convolution):
        monkeypatch.setattr(module, "loaded_library", never)
    model(input_ids=torch.tensor([[5]]), use_cache=True).logits.sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_uses_it(
    make_checkpoint: Callable[..., Path],
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    family: str,
) -> None:
    """With the ids that transformers' own functions give; nothing is said of packages for GPUs."""
    found = []
    monkeypatch.setattr(skeleton, "use_token_delta_nets", lambda model: None)  # which needs neither function
    for native in (True, False):
        if not native:
            monkeypatch.setattr(skeleton, "use_native_delta_rule", lambda model: None)
        with moe_local.load(make_checkpoint(family), device="cpu", experts="fp32") as model:
            calls.clear()
            out = model.generate([5, 6, 7], max_new_tokens=8, do_sample=False, eos_token_id=None)
            assert len(calls) == (2 * 8 * len(layers_of(model.hf)) if native else 0)
            found.append(out.token_ids)
    assert found[0] == found[1]
    assert "reference" not in caplog.text
