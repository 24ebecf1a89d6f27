"""Decoder layers that the library computes together, ahead of their calls: that nothing but the time tells,
and that what happens to one of them is noticed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_local
from moe_local.offload.modeling.onlooker import Onlooker
from moe_local.offload.native.library import library
from moe_local.offload.store.residents import Residents
from support.decoder_layers import (
    BETWEEN,
    FORWARDS,
    IDS,
    PARTS,
    apart,
    counted,
    layers_of,
    one_by_one,
    together,
)
from support.variants import others_slow

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

torch.set_num_threads(1)

LAYERS = 3
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 5}),
    ("qwen3_moe", {}),
    ("gpt_oss", {}),
    ("gpt_oss", {"sliding_window": 5}),  # in every other layer, so that masks differ
]


@pytest.fixture
def load(make_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """A model of three layers, all experts in RAM."""

    def load(
        family: str = "mixtral", dense: str = "bf16", config: dict[str, Any] | None = None, **more: Any
    ) -> Any:
        folder = make_checkpoint(family, **(config or {}))
        return moe_local.load(folder, device="cpu", experts="nf4", dense=dense, context=64, **more)

    return load


@pytest.mark.parametrize("dense", [pytest.param("fp32", marks=pytest.mark.slow), "bf16", "nf4"])
@pytest.mark.parametrize(("family", "config"), CASES)
def test_no_bit_changes(
    load: Callable[..., Any], family: str, config: dict[str, Any], dense: str, passes: list[int]
) -> None:
    with load(family, dense, config) as model:
        got = one_by_one(model.hf)
        counts = counted(model)
    assert passes == [LAYERS] * len(IDS)
    with load(family, dense, config) as model:
        assert torch.equal(one_by_one(apart(model.hf)), got)
        assert counted(model) == counts
    assert len(passes) == len(IDS)


@pytest.mark.parametrize(("family", "config"), CASES)
def test_tokens_of_several_sequences(
    load: Callable[..., Any], family: str, config: dict[str, Any], passes: list[int]
) -> None:
    """Layers of a batch may have different masks, of which only the first one's is known."""
    prompts, new = [[*IDS, 12, 13], IDS[2:8], [9, *IDS[::-1]]], 4
    with load(family, config=config, parallel=3) as model:
        got = together(model.hf, prompts, new)
        counts = counted(model)
    alone = sum(len(prompt) - new for prompt in prompts)
    assert passes == [LAYERS] * (alone + new)
    with load(family, config=config, parallel=3) as model:
        assert all(map(torch.equal, together(apart(model.hf), prompts, new), got))
        assert counted(model) == counts


def test_a_model_generates_so(load: Callable[..., Any], passes: list[int]) -> None:
    with load() as model:
        ids = model.generate(torch.tensor([IDS]), max_new_tokens=6, eos_token_id=None)
        assert passes == [LAYERS] * 5  # the prompt gives the first token
        apart(model.hf)
        assert torch.equal(model.generate(torch.tensor([IDS]), max_new_tokens=6, eos_token_id=None), ids)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("before", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hooks_see_what_they_always_saw(
    load: Callable[..., Any], part: str, before: bool, passes: list[int]
) -> None:
    """Registered between two tokens."""
    found = []
    for alone in (False, True):
        with load() as model:
            hf = apart(model.hf) if alone else model.hf
            seen: list[torch.Tensor] = []

            def look(_: Any, args: Any, kwargs: Any, *output: Any, seen: Any = seen) -> None:
                everything = (*args, *kwargs.values(), *output)
                tensors = [a for item in everything for a in (item if isinstance(item, tuple) else [item])]
                seen += [t.clone().float().flatten() for t in tensors if torch.is_tensor(t)]

            def register(place: int, hf: Any = hf, look: Any = look) -> None:
                if place == 3:
                    module = layers_of(hf)[2].get_submodule(part)
                    of = module.register_forward_pre_hook if before else module.register_forward_hook
                    of(look, with_kwargs=True)

            found.append((one_by_one(hf, before=register), seen))
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1]) > 0
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert passes == [LAYERS] * 3 + [2] * (len(IDS) - 3), "up to the layer with the hook"


def test_who_asked_for_hidden_states_slows_nobody_down(load: Callable[..., Any], passes: list[int]) -> None:
    """Transformers' hooks stay, and are awake only in such a call."""
    with load() as model:
        want = one_by_one(model.hf)
        passes.clear()
        with torch.no_grad():
            shown = [model.hf(torch.tensor([[5]]), output_hidden_states=True).hidden_states for _ in range(2)]
        assert not passes
        assert model.hf.model.layers[0]._forward_hooks
        assert all(map(torch.equal, *shown))
        assert len(shown[0]) == LAYERS + 1
        assert torch.equal(one_by_one(model.hf), want)
        assert passes == [LAYERS] * len(IDS)


@pytest.mark.parametrize("replaced", ["input", "output"])
def test_a_hook_that_changes_what_goes_on(load: Callable[..., Any], replaced: str) -> None:
    found = []
    for alone in (False, True):
        with load() as model:
            hf = apart(model.hf) if alone else model.hf
            layer = layers_of(hf)[1]
            if replaced == "input":
                layer.register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))
            else:
                layer.register_forward_hook(lambda _, args, output: output * 1.5)
            found.append(one_by_one(hf))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", others_slow(BETWEEN, list(BETWEEN)[::2]))
def test_what_changes_between_two_tokens_is_noticed(
    load: Callable[..., Any], name: str, passes: list[int]
) -> None:
    change, _ = BETWEEN[name]
    found = []
    for alone in (False, True):
        with load(dense="fp32") as model:
            hf = apart(model.hf) if alone else model.hf
            layers = layers_of(hf)

            def before(place: int, hf: Any = hf, layers: Any = layers) -> None:
                if place == 4:
                    torch.manual_seed(3)
                    change(layers[2], hf)

            with torch.random.fork_rng():
                found.append(one_by_one(hf, before=before))
    assert torch.equal(*found)
    after = {"attention that gives scores": 0, "weights move": 3, "a module that nobody calls": 3}.get(
        name, 2
    )
    assert passes == [3] * 4 + [after] * (len(IDS) - 4) * (after > 0)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("part", ["mlp", "self_attn", "post_attention_layernorm", "mlp.experts"])
def test_parts_that_are_replaced_by_something_else(
    load: Callable[..., Any], number: int, part: str, passes: list[int]
) -> None:
    class Else(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return (0.5 * x, None) if part == "self_attn" else 0.5 * x

    found = []
    for alone in (False, True):
        with load() as model:
            hf = apart(model.hf) if alone else model.hf

            def replace(place: int, hf: Any = hf) -> None:
                if place == 4:
                    layers_of(hf)[number].set_submodule(part, Else())

            found.append(one_by_one(hf, before=replace))
    assert torch.equal(*found)
    assert passes == [LAYERS] * 4


def reverse(hf: Any) -> None:
    hf.model.layers = nn.ModuleList(reversed(hf.model.layers))


def reverse_in_place(hf: Any) -> None:
    for number, layer in enumerate(reversed(list(hf.model.layers))):
        hf.model.layers[number] = layer


def repeat(hf: Any) -> None:
    hf.model.layers[1] = hf.model.layers[0]


@pytest.mark.parametrize("change", [reverse, reverse_in_place, repeat])
def test_layers_in_another_order(load: Callable[..., Any], change: Callable[[Any], None]) -> None:
    found = []
    for alone in (False, True):
        with load() as model:
            hf = apart(model.hf) if alone else model.hf
            found.append(one_by_one(hf, before=lambda place, hf=hf: change(hf) if place == 4 else None))
    assert torch.equal(*found)


def test_who_looks_on_is_shown_all(load: Callable[..., Any], passes: list[int]) -> None:
    with load() as model:
        want = one_by_one(model.hf)
        passes.clear()
        given: list[torch.Tensor] = []
        layers_of(model.hf)[2].post_attention_layernorm.register_forward_pre_hook(Onlooker(given.append))
        assert torch.equal(one_by_one(model.hf), want)
        assert len(given) == FORWARDS
        assert passes == [2] * len(IDS)


def test_another_dtype_between_two_tokens_of_different_sequences(
    load: Callable[..., Any], passes: list[int]
) -> None:
    with load() as model:
        narrow = one_by_one(model.hf)
        wide = one_by_one(model.hf.float())
        assert passes == [LAYERS] * 2 * len(IDS)
        assert wide.dtype is torch.float32
        assert not torch.equal(wide, narrow)
        assert torch.equal(one_by_one(apart(model.hf)), wide)


def test_a_router_of_nan(load: Callable[..., Any], passes: list[int]) -> None:
    found = []
    for alone in (False, True):
        with load() as model:
            hf = apart(model.hf) if alone else model.hf
            layers_of(hf)[2].mlp.gate.weight.fill_(float("nan"))
            found.append((one_by_one(hf), counted(model)))
    assert all(logits.isnan().all() for logits, _ in found)
    assert found[0][1] == found[1][1]
    assert passes == [LAYERS] * len(IDS)


def test_experts_that_leave_are_left_to_the_store(load: Callable[..., Any], passes: list[int]) -> None:
    with load() as model:
        want = one_by_one(model.hf)
        passes.clear()

        def leave(place: int) -> None:
            if place == 3:
                model.parts.store.tier.empty()

        assert torch.equal(one_by_one(model.hf, before=leave), want)
        assert passes == [LAYERS] * 3
        model.check_integrity()


def test_a_layer_that_residents_leave_out_ends_a_pass(
    load: Callable[..., Any], passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    serves = Residents.serves
    monkeypatch.setattr(Residents, "serves", lambda self, number: number != 2 and serves(self, number))
    with load() as model:
        got = one_by_one(model.hf)
        assert passes == [2] * len(IDS)
        assert torch.equal(one_by_one(apart(model.hf)), got)


def test_a_copied_layer_does_not_bring_the_others(load: Callable[..., Any]) -> None:
    with load() as model:
        layer = layers_of(model.hf)[1]._token_layer
        assert layer.among is not None
        assert copy.copy(layer).among is None


def test_no_cycle_keeps_a_model(load: Callable[..., Any], passes: list[int]) -> None:
    gc.collect()
    gc.disable()
    try:
        with load() as model:
            one_by_one(model.hf)
            layer = weakref.ref(layers_of(model.hf)[0])
        assert passes
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_a_single_layer_is_computed_by_itself(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("mixtral", num_hidden_layers=1)
    with moe_local.load(folder, device="cpu", experts="nf4", context=64) as model:
        assert layers_of(model.hf)[0]._token_layer.among is None
