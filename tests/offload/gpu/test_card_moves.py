"""Models on two cards: what goes from one to the other, and tokens from graphs of both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from moe_local.offload.engine import static_row
from moe_local.offload.engine.card_graphs import CardGraphs
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.gpu.card_moves import CardMoves, move_between_cards, moves_of
from moe_local.offload.gpu.relief import Shortage
from moe_local.offload.modeling.masks import use_capturable_mask
from support import fake_cards, fake_graphs, plain_experts, tiny_models
from support.engine_runs import random_ids

torch.set_num_threads(1)

TOKENS = 8
ONE, TWO = torch.device("cpu", 0), torch.device("cpu", 1)
FAMILIES = [
    "mixtral",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("gpt_oss", "deepseek_v3", "qwen3_moe", "olmoe")
    ),
]


class Spread:
    """A tiny model with its first layer on one fake card and the others on another."""

    def __init__(self, hf: Any, **limits: Any) -> None:
        self.graphs = {ONE: fake_graphs.FakeGraphs(), TWO: fake_graphs.FakeGraphs(**limits)}
        self.cards = fake_cards.FakeCards(self.graphs)
        places = {f"model.layers.{at}": TWO if at else ONE for at in range(len(hf.model.layers))}
        places |= {"model.embed_tokens": ONE, "model.rotary_emb": ONE, "model.norm": TWO, "lm_head": TWO}
        self.moves = fake_cards.FakeCardMoves(self.cards, hf, places)
        hf._card_moves = self.moves
        self.hf = plain_experts.offloaded(hf)
        self.layers = len(hf.runner.originals)
        self.kv: Any = make_kv(hf, 1, 64)
        for at, store in enumerate(self.kv.layers):
            self.cards.put(TWO if at else ONE, store.tensors())

    def decoded(self, graphs: Any, relief: Any = None) -> tuple[list[int], Engine]:
        """Ids of TOKENS tokens, and the engine that has computed them."""
        engine = Engine(self.hf, self.kv, chunk=8)
        engine.token_step = engine.make_token_step(graphs)
        engine.relief = relief
        sequence = engine.join(
            random_ids(12), make_settings(self.hf, [1], max_new_tokens=TOKENS, eos_token_id=None)
        )
        with self.cards:
            while sequence.finish_reason is None:
                engine.step()
                engine.check_integrity()
                assert self.moves.seam is None
        engine.leave(sequence)
        engine.forget()
        return sequence.new_ids, engine


@pytest.fixture(autouse=True)
def few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_row, "FEWEST_COLUMNS", 16)


@pytest.fixture
def spread() -> Callable[..., Spread]:
    """spread(family, ...) -> a tiny model; `limits` are those of the second card's FakeGraphs."""

    def make(family: str = "mixtral", **limits: Any) -> Spread:
        hf = tiny_models.tiny_model(family)
        use_capturable_mask(hf)
        return Spread(hf, **limits)

    return make


@functools.cache
def whole(family: str = "mixtral") -> list[int]:
    """The ids of the same model on one device, by transformers."""
    hf = tiny_models.tiny_model(family)
    with torch.inference_mode():
        out = hf.generate(
            torch.tensor([random_ids(12)]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
    return list(map(int, out[0, 12:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_card_has_graphs_of_its_own(spread: Callable[..., Spread], family: str) -> None:
    """Computed, captured and replayed tokens: those of one device; nothing is captured across cards."""
    model = spread(family)
    got, engine = model.decoded(CardGraphs(model.graphs))
    assert got == whole(family)
    step = engine.token_step
    assert step is not None
    assert step.failure is None
    assert len(step.captured) == 2
    # between: the experts of each layer, the way to the second card and the way back; a second mask goes
    # there when the first layer of its kind asks for it
    ways = 3 if family == "gpt_oss" else 2
    assert all(captured.segments == model.layers + ways + 1 for captured in step.captured.values())
    assert model.graphs[ONE].captures == 2 * (2 if family == "deepseek_v3" else 3)  # its first layer has none
    for captured in step.captured.values():
        assert all(segment.operations for segment, _ in captured._parts)  # CUDA warns of an empty graph
    for graphs in model.graphs.values():
        assert graphs.replays > graphs.captures


def test_what_every_layer_is_given_goes_along_once(spread: Callable[..., Spread]) -> None:
    """The hidden state, cosines and sines to two layers, and the logits back; anew in each forward."""
    model = spread()
    ids = torch.tensor([random_ids(5)])
    with model.cards, torch.inference_mode():
        for forwards in (1, 2):
            logits = model.hf(input_ids=ids).logits
            assert model.moves.moved == 4 * forwards
            assert model.cards.card_of(logits) == ONE
        assert model.moves._moved == {}
        hook = model.hf.model.norm.register_forward_pre_hook(failing)
        with pytest.raises(ValueError, match="in the midst"):
            model.hf(input_ids=ids)
        assert model.moves._moved == {}
        hook.remove()


def failing(module: nn.Module, args: Any) -> None:
    raise ValueError("in the midst")


def test_cards_do_not_see_what_another_has(
    spread: Callable[..., Spread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake cards are unkind enough to tell."""
    model = spread()
    monkeypatch.setattr(type(model.moves), "is_elsewhere", lambda *given: False)
    with model.cards, torch.inference_mode(), pytest.raises(RuntimeError, match="on the same device"):
        model.hf(input_ids=torch.tensor([[5]]))


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 1, 3])
def test_memory_that_the_second_card_lacks(spread: Callable[..., Spread], room: int) -> None:
    """The token is captured once something gave way there, else computed; the ids are the same."""
    for gives_way in (True, False):
        model = spread(room=room)
        second, asked = model.graphs[TWO], []

        def relief(lacking: Shortage, second: Any = second, asked: Any = asked) -> bool:
            asked.append(lacking)
            second.room = None
            return True

        got, engine = model.decoded(CardGraphs(model.graphs), relief if gives_way else None)
        assert got == whole()
        assert second.refusals == 1
        assert len(asked) == gives_way
        assert engine.token_step is not None
        assert engine.token_step.captures == gives_way


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", [0, 2])
def test_a_capture_that_the_second_card_refuses(spread: Callable[..., Spread], fail_at: int) -> None:
    model = spread(fail_at=fail_at)
    got, engine = model.decoded(CardGraphs(model.graphs))
    assert got == whole()
    assert engine.token_step is not None
    assert not engine.token_step.captures
    assert "operation failed" in (engine.token_step.failure or "")


# What modules are given


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.given: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given.append((args, kwargs))
        return args[0]


def test_nested_arguments_are_moved_and_those_to_skip_are_not() -> None:
    """Meta tensors are on a device that every torch has."""
    meta = torch.device("meta")
    model, layer = nn.Module(), Layer()
    model.layer = layer
    moves = CardMoves(model, {"layer": meta}, torch.device("cpu"), skip=["kept"])
    x, mask, kept = torch.ones(2), torch.ones(3), torch.ones(4)
    for _ in range(2):
        layer(x, [(mask, "word")], mask={"full": mask, "none": None}, kept=kept)
    (args, kwargs), (again, others) = layer.given
    assert args[0].device == args[1][0][0].device == kwargs["mask"]["full"].device == meta
    assert args[1][0][1] == "word"
    assert kwargs["mask"]["none"] is None
    assert kwargs["kept"] is kept
    assert others["mask"]["full"] is kwargs["mask"]["full"] is again[1][0][0]
    assert again[0] is not args[0]
    assert len(moves._moved) == 1
    there = torch.ones(2, device=meta)
    layer(there, mask=there)
    assert layer.given[-1][0][0] is layer.given[-1][1]["mask"] is there


def test_accelerates_hooks_are_replaced() -> None:
    hf = tiny_models.tiny_model("mixtral")
    ids = torch.tensor([random_ids(5)])
    with torch.inference_mode():
        want = hf(input_ids=ids).logits
        dispatch_model(hf, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
        assert hasattr(hf.lm_head, "_hf_hook")
        assert moves_of(hf) is None
        move_between_cards(hf, {"model": "cpu", "lm_head": "cpu"})
        assert not any(hasattr(module, "_hf_hook") for module in hf.modules())
        assert not any("forward" in vars(module) for module in hf.modules())
        assert moves_of(hf) is not None
        assert torch.equal(hf(input_ids=ids).logits, want)
