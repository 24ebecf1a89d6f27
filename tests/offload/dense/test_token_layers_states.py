"""Layers that keep a state, computed with others before they are called: when the states change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import moe_local
from moe_local.offload.dense.layers_ahead import Ahead
from moe_local.offload.modeling.names import cache_name
from moe_local.offload.native.library import library
from support.decoder_layers import IDS, Loop, apart, counted, one_by_one, together
from support.variants import others_slow

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

torch.set_num_threads(1)

FAMILY = "qwen3_next"


@pytest.fixture
def load(make_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """A model with all experts in RAM: layers with states, but for the third of four."""

    def load(family: str, dense: str = "bf16", config: dict[str, Any] | None = None, **more: Any) -> Any:
        folder = make_checkpoint(family, **(config or {}))
        return moe_local.load(folder, device="cpu", experts="nf4", dense=dense, context=64, **more)

    return load


def test_a_model_with_states_generates_so(load: Callable[..., Any], passes: list[int]) -> None:
    with load("qwen3_5_moe") as model:
        passes.clear()
        ids = model.generate(torch.tensor([IDS]), max_new_tokens=6, eos_token_id=None)
        assert passes == [4] * 5  # the prompt gives the first token
        apart(model.hf)
        assert torch.equal(model.generate(torch.tensor([IDS]), max_new_tokens=6, eos_token_id=None), ids)


def states_of(loop: Loop) -> list[torch.Tensor]:
    return [tensor for store in loop.kv.states.values() for tensor in store.tensors()]


class Outcomes:
    """Of the same for layers together, and for each alone: what `use` gives, the states that it leaves and
    the counts; and how many layers were computed at a time."""

    def __init__(self, load: Callable[..., Any], passes: list[int], use: Callable[[Loop], Any]) -> None:
        self.passes: list[list[int]] = []
        self._found = []
        for alone in (False, True):
            with load(FAMILY, "fp32") as model:
                loop = Loop(apart(model.hf) if alone else model.hf)
                passes.clear()
                output = use(loop)
                self.passes.append(list(passes))
                states = [state.clone() for state in states_of(loop)]
                one_by_one(model.hf)  # whose first layer settles what was counted ahead
                self._found.append(([output, *states], counted(model)))

    def agree(self) -> bool:
        (got, counts), (want, wanted) = self._found
        assert self.passes[1] == []
        return bool(counts == wanted) and all(map(torch.equal, got, want))


ORDERS = [[0, 1], [0, 1, 3], [0, 2, 1, 3], [1, 0, 2, 3], [0, 0, 1], [3, 2, 1, 0]]


@pytest.mark.parametrize("order", others_slow(ORDERS, ORDERS[::3]))
def test_a_state_changes_when_its_layer_is_called(
    load: Callable[..., Any], order: list[int], passes: list[int]
) -> None:
    found = Outcomes(load, passes, lambda loop: loop(order))
    assert found.agree()
    assert any(count == 4 for count in found.passes[0]) == (order[0] == 0)


def test_a_forward_that_fails_leaves_the_states_behind_it(
    load: Callable[..., Any], passes: list[int]
) -> None:
    def use(loop: Loop) -> torch.Tensor:
        before: list[torch.Tensor] = []

        def fail(number: int, x: torch.Tensor) -> None:
            if loop.kv.lens[0] < 2:
                return
            if number == 0:
                before.extend(state.clone() for state in states_of(loop))
            if number == 2:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            loop([0, 1, 2, 3], before=fail)
        stayed = list(map(torch.equal, before, states_of(loop)))
        assert stayed == [False] * 4 + [True] * 2  # two tensors of layers 0, 1 and 3 each
        return loop([0, 1, 2, 3])

    found = Outcomes(load, passes, use)
    assert found.agree()
    # not the first token, which finds no states, but those after the failure
    assert found.passes[0] == [4] * 6


def changed(loop: Loop, number: int) -> None:
    for tensor in loop.kv.states[number].tensors():
        tensor.mul_(-1.5)


def called(loop: Loop, number: int, x: torch.Tensor) -> None:
    """A call of its own."""
    net = loop.layers[number].linear_attn
    net(hidden_states=x, **{cache_name(Qwen3NextGatedDeltaNet.forward): loop.kv.row(0)})


CHANGES_BETWEEN: dict[str, Callable[[Loop, torch.Tensor], Any]] = {
    "what goes on": lambda loop, x: x.mul_(1.5),
    "a state": lambda loop, x: changed(loop, 1),
    "an earlier state": lambda loop, x: changed(loop, 0),
    "a later state": lambda loop, x: changed(loop, 3),
    "a state, by its layer": lambda loop, x: called(loop, 1, x),
    "a later state, by its layer": lambda loop, x: called(loop, 3, x),
}


@pytest.mark.parametrize("inference", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", others_slow(CHANGES_BETWEEN, list(CHANGES_BETWEEN)[::2]))
def test_what_changes_between_two_layers(
    load: Callable[..., Any], change: str, inference: bool, passes: list[int]
) -> None:
    def use(loop: Loop) -> torch.Tensor:
        def act(number: int, x: torch.Tensor) -> None:
            if number == 1:
                CHANGES_BETWEEN[change](loop, x)

        with torch.inference_mode(inference):
            return loop([0, 1, 2, 3], before=act)

    found = Outcomes(load, passes, use)
    assert found.agree()
    assert found.passes[0] == [4] * 3


@pytest.mark.parametrize("inference", [False, True])
def test_states_in_a_cache_of_transformers(load: Callable[..., Any], inference: bool) -> None:
    """In inference mode, torch does not count how often they are changed."""
    found = []
    for alone in (False, True):
        with load(FAMILY, "fp32") as model:
            loop = Loop(apart(model.hf) if alone else model.hf)
            with torch.inference_mode(inference):
                cache = DynamicCache(config=model.hf.config)
                loop.kv.row = lambda row, cache=cache: cache

                def act(number: int, x: torch.Tensor, cache: Any = cache) -> None:
                    if number == 1 and cache.layers[1].has_previous_state[0]:
                        cache.layers[1].recurrent_states[0].mul_(-1.5)

                found.append(loop([0, 1, 2, 3], before=act))
    assert torch.equal(found[0], found[1])


def test_a_mask_that_a_state_does_not_suit(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a single sequence changes no number, so only whether the layer is computed anew is seen."""
    expected: list[tuple[int, bool]] = []
    goes_on = Ahead.goes_on

    def noted(self: Ahead, modules: Any, number: int, *args: Any) -> bool:
        expected.append((number, goes_on(self, modules, number, *args)))
        return expected[-1][1]

    monkeypatch.setattr(Ahead, "goes_on", noted)
    with load(FAMILY, "fp32") as model:
        Loop(model.hf)([0, 1, 2, 3], more={3: {"attention_mask": torch.ones(1, 1)}})
    assert expected == [(1, True), (2, True), (3, False)] * 3


ROWS = [("SSSASSSA", "qwen3_5_moe"), ("ASSA", "qwen3_next"), ("SA", "qwen3_5_moe")]


@pytest.mark.parametrize(("row", "family"), ROWS)
def test_rows_of_both_kinds(load: Callable[..., Any], row: str, family: str, passes: list[int]) -> None:
    kinds = {"S": "linear_attention", "A": "full_attention"}
    config = {"num_hidden_layers": len(row), "layer_types": [kinds[kind] for kind in row]}
    prompts, new = [[*IDS, 12, 13], IDS[2:8]], 3
    found = []
    for alone in (False, True):
        with load(family, config=config, parallel=2) as model:
            hf = apart(model.hf) if alone else model.hf
            passes.clear()
            found.append([one_by_one(hf), *together(hf, prompts, new), counted(model)])
            assert passes[len(passes) - new :] == ([] if alone else [len(row)] * new)
    assert all(map(torch.equal, found[0][:-1], found[1][:-1]))
    assert found[0][-1] == found[1][-1]


def test_attention_that_gives_scores_ends_the_row(load: Callable[..., Any], passes: list[int]) -> None:
    found = []
    for alone in (False, True):
        with load(FAMILY, "fp32") as model:
            hf = apart(model.hf) if alone else model.hf
            one_by_one(hf)
            hf.set_attn_implementation("eager")
            passes.clear()
            found.append(one_by_one(hf))
            assert passes == ([] if alone else [2] * (len(IDS) - 1))
            hf.set_attn_implementation("sdpa")
            found.append(one_by_one(hf))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_torchs_default_dtype_does_not_matter(load: Callable[..., Any], passes: list[int]) -> None:
    with load(FAMILY) as model:
        want = one_by_one(model.hf)
        torch.set_default_dtype(torch.bfloat16)
        try:
            passes.clear()
            assert torch.equal(one_by_one(model.hf), want)
        finally:
            torch.set_default_dtype(torch.float32)
    assert passes == [4] * (len(IDS) - 1)
