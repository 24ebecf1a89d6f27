"""Decoder layers that run in one call of the C++ library, and experts that lie in RAM for good: which are
taken, and that nothing but the time tells."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralSparseMoeBlock

import moe_local
from moe_local.offload.dense.attention_trial import use_token_attention
from moe_local.offload.dense.norm import use_native_norms
from moe_local.offload.dense.router import use_native_routers
from moe_local.offload.dense.token_attention import TokenAttention
from moe_local.offload.dense.token_layer import TokenLayer, use_token_layers
from moe_local.offload.dense.token_layers import TokenLayers
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.kernels.cpu_table import CpuTable
from moe_local.offload.modeling.onlooker import Onlooker
from moe_local.offload.native.library import library
from moe_local.offload.prefetch.predictor import RouterPredictor
from moe_local.offload.prefetch.prefetch import Guess
from moe_local.offload.store.residents import Residents
from support import tiny_models
from support.decoder_layers import BETWEEN, FORWARDS, IDS, PARTS, layers_of, one_by_one, together
from support.variants import others_slow

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

torch.set_num_threads(1)

TAKEN = {
    "mixtral": "block",
    "qwen3_moe": "block",
    "gpt_oss": "block",
    "qwen2_moe": "block",
    "qwen3_5_moe": "block",
    "deepseek_v3": "block",
    "glm4_moe_lite": "block",
    "phimoe": None,  # other norms
    "olmoe": None,
}
"""By model type: whether layers run in one call, and their routers with them."""

SHARED_BY_SIGMOID = ("qwen2_moe", "qwen3_5_moe")
"""Of which torch's sigmoid may round the last bit otherwise."""

CLOSE = {"fp32": 1e-5, "bf16": 0.02}


def keeping_states(hf: Any) -> int:
    """How many layers keep a state, which leave the first token, without one, to transformers."""
    return sum(hasattr(layer, "linear_attn") for layer in layers_of(hf))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each token through a layer, or through the experts of one, by the new ways; layers are not
    computed together."""
    monkeypatch.setattr(TokenLayers, "join", lambda *_: None)
    made: list[str] = []
    for cls, name in ((TokenLayer, "__call__"), (CpuTable, "run")):
        monkeypatch.setattr(cls, name, noting(made, cls.__name__, getattr(cls, name)))
    return made


def noting(made: list[str], of: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: Any, *args: Any) -> Any:
        made.append(of)
        return plain(self, *args)

    return noted


def prepared(hf: Any) -> Any:
    """A copy of a model with all that the library does before layers."""
    hf = copy.deepcopy(hf)
    use_native_norms(hf)
    use_native_routers(hf)
    use_token_attention(hf)
    return hf


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "bf16" if TAKEN[family] else "fp32") for family in TAKEN),
        *(pytest.param(family, "fp32", marks=pytest.mark.slow) for family in TAKEN if TAKEN[family]),
    ],
)
def test_no_bit_changes(
    make_checkpoint: Callable[..., Path],
    family: str,
    dtype: str,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_checkpoint(family)

    def load() -> Any:
        return moe_local.load(folder, device="cpu", experts="nf4", dense=dtype, context=64)

    with load() as model:
        assert all(isinstance(layer, nn.Module) for layer in layers_of(model.hf))
        taken = [vars(layer).get("_token_layer") for layer in layers_of(model.hf)]
        found = {None if layer is None else "layer" if layer.block is None else "block" for layer in taken}
        assert TAKEN[family] in found
        if TAKEN[family] is not None:
            assert all(layer is not None for layer in taken)
        without_state = keeping_states(model.hf)
        got = one_by_one(model.hf)
        counts = model.stats().routed, model.stats().hits, model.stats().misses
    assert calls.count("TokenLayer") == len(IDS) * sum(layer is not None for layer in taken) - without_state
    assert "CpuTable" in calls
    calls.clear()
    monkeypatch.setattr(TokenLayer, "of", lambda module: None)
    monkeypatch.setattr(Residents, "serves", lambda self, number: False)
    with load() as model:
        if family in SHARED_BY_SIGMOID:
            torch.testing.assert_close(one_by_one(model.hf), got, rtol=0, atol=CLOSE[dtype])
        else:
            assert torch.equal(one_by_one(model.hf), got)
        assert (model.stats().routed, model.stats().hits, model.stats().misses) == counts
    assert calls == []


@pytest.mark.parametrize("dtype", others_slow(["fp32", "bf16"], ["bf16"]))
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mixtral", {}),
        ("mixtral", {"sliding_window": 5}),
        ("qwen3_moe", {}),
        ("gpt_oss", {"sliding_window": 5}),
        ("qwen2_moe", {}),
        ("qwen3_5_moe", {}),
    ],
)
def test_a_token_among_others_has_the_bits_that_it_has_alone(
    make_checkpoint: Callable[..., Path],
    family: str,
    config: dict[str, Any],
    dtype: str,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences of different lengths, some longer than the window; and with the model's own code, which
    rounds otherwise, the same but for that."""
    prompts, new = [[*IDS, 12, 13], IDS[2:8], [9, *IDS[::-1]]], 4
    folder = make_checkpoint(family, **config)

    def load() -> Any:
        return moe_local.load(folder, device="cpu", experts="nf4", dense=dtype, context=64, parallel=3)

    with load() as model:
        taken = sum("_token_layer" in vars(layer) for layer in layers_of(model.hf))
        assert taken > 0
        calls.clear()
        got = together(model.hf, prompts, new)
        counts = model.stats()
        forwards = sum(len(prompt) - new for prompt in prompts) + new
        assert calls.count("TokenLayer") == taken * forwards - len(prompts) * keeping_states(model.hf)
        layers = len(model.plan.request.spec.layers)
        assert calls.count("CpuTable") == layers * (1 + forwards)  # and once to try the cache out
        alone = [one_by_one(model.hf, prompt)[-new:] for prompt in prompts]
    assert all(map(torch.equal, got, alone))
    if dtype == "bf16":  # in which the rounding may choose other experts
        return
    monkeypatch.setattr(TokenLayer, "of", lambda module: None)
    monkeypatch.setattr(TokenAttention, "of", lambda module, dtype: None)
    monkeypatch.setattr(Residents, "serves", lambda self, number: False)
    with load() as model:
        plain = together(model.hf, prompts, new)
        assert (model.stats().routed, model.stats().hits) == (counts.routed, counts.hits)
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


class Scaled(MixtralDecoderLayer):
    """As Granite: what is added is multiplied."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        x = hidden_states
        x = x + 1.01 * self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class Parallel(MixtralDecoderLayer):
    """As Cohere's: both parts are given the same."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        x, normed = hidden_states, self.input_layernorm(hidden_states)
        x = x + self.self_attn(hidden_states=normed, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(hidden_states))


class Plain(MixtralDecoderLayer):
    """As it is, written otherwise."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        x = hidden_states
        x = x + self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


@pytest.mark.parametrize(("cls", "taken"), [(Plain, True), (Scaled, False), (Parallel, False)])
def test_layers_that_add_up_otherwise_are_not_taken(cls: Any, taken: bool) -> None:
    hf = prepared(tiny_models.tiny_model("mixtral", num_hidden_layers=1).requires_grad_(False))
    layers_of(hf)[0].__class__ = cls
    use_token_layers(hf)
    assert ("_token_layer" in vars(layers_of(hf)[0])) == taken


class Weighed(MixtralSparseMoeBlock):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(x)
        return self.experts(x, ids, 2 * weights).view(hidden_states.shape)


class Doubled(MixtralSparseMoeBlock):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        return 2 * super().forward(hidden_states)


class Clipped(MixtralSparseMoeBlock):
    """Experts are given something else than the router."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(x)
        return self.experts(x.clamp(-0.5, 0.5), ids, weights).view(hidden_states.shape)


@pytest.mark.parametrize("cls", [Weighed, Doubled, Clipped])
def test_blocks_that_do_more_are_called(cls: Any) -> None:
    plain = prepared(tiny_models.tiny_model("mixtral").requires_grad_(False))
    for layer in layers_of(plain):
        layer.mlp.__class__ = cls
    hf = copy.deepcopy(plain)
    use_token_layers(hf)
    assert all(layer._token_layer.block is None for layer in layers_of(hf))
    assert torch.equal(one_by_one(hf), one_by_one(plain))


@pytest.fixture
def taken() -> tuple[Any, Any]:
    """A model as it was, and its copy whose layers run in the library."""
    plain = prepared(tiny_models.tiny_model("mixtral").requires_grad_(False))
    hf = copy.deepcopy(plain)
    use_token_layers(hf)
    assert all(layer._token_layer.block is not None for layer in layers_of(hf))
    return plain, hf


@pytest.mark.parametrize("family", [family for family in TAKEN if TAKEN[family] is not None])
def test_guesses_need_no_other_way(
    make_checkpoint: Callable[..., Path], family: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guesses: list[tuple[int, list[int], list[int]]] = []
    predict = RouterPredictor.predict

    def noting(self: RouterPredictor, layer: int, lookahead: int) -> list[Guess]:
        made = predict(self, layer, lookahead)
        guesses.extend((layer, [guess.layer], guess.ranked.tolist()) for guess in made)
        return made

    monkeypatch.setattr(RouterPredictor, "predict", noting)
    options: dict[str, Any] = {"experts": "nf4", "context": 64, "slots": 4, "prefetch": "router"}
    with moe_local.load(make_checkpoint(family), device="cpu", **options) as model:
        taken = sum("_token_layer" in vars(layer) for layer in layers_of(model.hf))
        moe_layers = sum(isinstance(module, OffloadedExperts) for module in model.hf.modules())
        got, found = one_by_one(model.hf), list(guesses)
        assert calls.count("TokenLayer") == len(IDS) * taken - keeping_states(model.hf) > 0
        assert len(found) == FORWARDS * (moe_layers - 1)
        calls.clear()
        guesses.clear()
        monkeypatch.setattr(TokenLayer, "places", lambda *_: None)
        assert torch.equal(one_by_one(model.hf), got)
        assert (guesses, calls) == (found, [])


@pytest.mark.parametrize("before", [False, True])
def test_who_looks_on_beside_a_hook_still_does(
    taken: tuple[Any, Any], calls: list[str], before: bool
) -> None:
    plain, hf = taken
    want, norm = one_by_one(plain), layers_of(hf)[1].post_attention_layernorm
    given: list[torch.Tensor] = []
    looked = norm.register_forward_pre_hook(Onlooker(given.append))
    assert torch.equal(one_by_one(hf), want)
    assert len(calls) == len(IDS) * len(layers_of(hf)), "an onlooker alone changes no layer's way"
    calls.clear()
    alone, seen = list(given), []
    given.clear()
    register = norm.register_forward_pre_hook if before else norm.register_forward_hook
    hook = register(lambda module, args, *output: seen.append(args[0]))
    assert torch.equal(one_by_one(hf), want)
    assert len(calls) == len(IDS) * (len(layers_of(hf)) - 1)
    assert len(alone) == len(given) == len(seen) == FORWARDS
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(alone, given, strict=True))
    assert all(a is b for a, b in zip(given, seen, strict=True))
    calls.clear()
    hook.remove()
    looked.remove()
    one_by_one(hf)
    assert len(calls) == len(IDS) * len(layers_of(hf))
    assert len(given) == FORWARDS, "nothing is shown to who has left"


def test_who_looks_at_another_part_sees_its_call(taken: tuple[Any, Any], calls: list[str]) -> None:
    _, hf = taken
    given: list[torch.Tensor] = []
    layers_of(hf)[1].input_layernorm.register_forward_pre_hook(Onlooker(given.append))
    one_by_one(hf)
    assert len(given) == FORWARDS
    assert len(calls) == len(IDS) * (len(layers_of(hf)) - 1)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_see_what_they_always_saw(taken: tuple[Any, Any], part: str, before: bool) -> None:
    seen: list[list[torch.Tensor]] = []
    for hf in taken:
        found: list[torch.Tensor] = []

        def look(_: Any, args: Any, kwargs: Any, *output: Any, found: Any = found) -> None:
            everything = (*args, *kwargs.values(), *output)
            tensors = [a for item in everything for a in (item if isinstance(item, tuple) else [item])]
            found += [t.clone().float().flatten() for t in tensors if torch.is_tensor(t)]

        module = layers_of(hf)[1].get_submodule(part)
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        hook = register(look, with_kwargs=True)
        one_by_one(hf)
        hook.remove()
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("name", BETWEEN)
def test_what_changes_between_two_tokens_is_noticed(
    taken: tuple[Any, Any], calls: list[str], name: str
) -> None:
    change, stay = BETWEEN[name]
    found = []
    for hf in taken:
        layers = layers_of(hf)

        def before(place: int, hf: Any = hf, layers: Any = layers) -> None:
            if place == 4:
                torch.manual_seed(3)
                change(layers[1], hf)

        with torch.random.fork_rng():
            calls.clear()
            found.append(one_by_one(hf, before=before))
    assert torch.equal(*found)
    assert len(calls) == 4 * len(layers_of(taken[1])) + (len(IDS) - 4) * stay
    assert name.startswith(("attention", "a module", "a part", "a router")) or not torch.allclose(
        found[0], one_by_one(taken[1])
    )


def test_a_weight_that_becomes_shorter_where_it_lies_is_not_read_beyond(taken: tuple[Any, Any]) -> None:
    _, hf = taken
    norm = layers_of(hf)[1].input_layernorm

    def cut(place: int) -> None:
        if place == 2:
            norm.weight.data = norm.weight.data[:32]

    with pytest.raises(RuntimeError, match="size of tensor"):
        one_by_one(hf, before=cut)


def test_a_model_that_is_closed_between_two_tokens_says_so(make_checkpoint: Callable[..., Path]) -> None:
    with moe_local.load(make_checkpoint("mixtral"), device="cpu", experts="nf4", context=64) as model:
        hf = model.hf

        def close(place: int) -> None:
            if place == 2:
                model.close()

        with pytest.raises(moe_local.MoeLocalError, match="closed"):
            one_by_one(hf, before=close)


def test_weights_that_move_are_found(taken: tuple[Any, Any], calls: list[str]) -> None:
    for hf in taken:
        for layer in layers_of(hf):
            layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight * 2, requires_grad=False)
            layer.mlp.gate.weight = nn.Parameter(-layer.mlp.gate.weight, requires_grad=False)
    assert torch.equal(one_by_one(taken[1]), one_by_one(taken[0]))
    assert len(calls) == len(IDS) * len(layers_of(taken[1]))


def test_copies_are_whole(taken: tuple[Any, Any], calls: list[str]) -> None:
    want = one_by_one(taken[0])
    for made in (copy.deepcopy(taken[1]), pickle.loads(pickle.dumps(taken[1]))):
        calls.clear()
        assert torch.equal(one_by_one(made), want)
        assert len(calls) == len(IDS) * len(layers_of(made))


def test_experts_that_leave_are_left_to_the_store(
    make_checkpoint: Callable[..., Path], calls: list[str]
) -> None:
    with moe_local.load(make_checkpoint("mixtral"), device="cpu", experts="nf4", context=64) as model:
        want = one_by_one(model.hf)
        assert "CpuTable" in calls
        calls.clear()
        model.parts.store.tier.empty()
        assert torch.equal(one_by_one(model.hf), want)
        assert "CpuTable" not in calls
        model.check_integrity()


def test_an_expert_chosen_twice_is_an_error(make_checkpoint: Callable[..., Path]) -> None:
    with moe_local.load(make_checkpoint("mixtral"), device="cpu", experts="nf4", context=64) as model:
        experts = layers_of(model.hf)[0].mlp.experts
        x, weights = torch.zeros(1, 64, dtype=torch.bfloat16), torch.full((1, 2), 0.5)
        with torch.no_grad(), pytest.raises(moe_local.MoeLocalError, match=r"expert twice.*\[3, 3\]"):
            experts(x, torch.tensor([[3, 3]]), weights)
        assert sum(map(sum, model.stats().routed.counts)) == 0
