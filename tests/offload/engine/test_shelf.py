"""Conversations that lose their rows and come back."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.engine import shelf
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.own_caches import OwnCaches
from moe_local.offload.engine.sequence import Sequence
from support import tiny_models
from support.engine_runs import answered_at_random, check_alone, finish, greedy, random_ids

torch.set_num_threads(1)
PLENTY = 2**30


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "nemotron_h"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.tiny_model(request.param)


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return tiny_models.tiny_model("mixtral")


def engine_of(model: Any, *, rows: int = 1, shelf_bytes: int = PLENTY, chunk: int = 512) -> Engine:
    return Engine(model, make_kv(model, rows, 900), chunk=chunk, shelf_bytes=shelf_bytes)


def answer(engine: Engine, prompt: list[int], *, reused: int | None = None, reuse: bool = True) -> Sequence:
    """The sequence of a prompt, which reuses so many tokens, finished, checked, and gone."""
    sequence = engine.join(prompt, greedy(engine.hf, 4), reuse=reuse)
    finish(engine, sequence)
    assert reused is None or sequence.reused_tokens == reused
    engine.leave(sequence)
    engine.check_integrity()
    check_alone(engine.hf, [sequence])
    return sequence


def fail(*_: Any, **__: Any) -> None:
    raise MemoryError("in the middle")


def shelved(engine: Engine) -> int:
    """How many conversations are on the engine's shelf."""
    return len(engine._rows._shelf._shelved)


def other(seed: int) -> list[int]:
    """A prompt too short to be shelved, which has nothing in common with others."""
    return [seed, *random_ids(40, seed=seed)]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_conversation_goes_on_after_others(model: Any, rows: int) -> None:
    engine = engine_of(model, rows=rows)
    first = answer(engine, random_ids(400), reused=0)
    for seed in (301, 302):
        answer(engine, other(seed), reused=0)
    assert shelved(engine) == 1
    second = answer(engine, [*first.ids, *random_ids(30, seed=1)], reused=len(first.ids) - 1)
    for seed in (303, 304):
        answer(engine, other(seed), reused=0)
    assert shelved(engine) == 1, "the second turn takes the place of the first"
    answer(engine, [*second.ids, 5, 6], reused=len(second.ids) - 1)


def test_it_also_goes_on_from_an_earlier_place(model: Any) -> None:
    """From a snapshot, where layers keep a state; twice, since what was shelved stays there."""
    engine = engine_of(model)
    prompt = random_ids(400)
    answer(engine, prompt, reused=0)
    for seed in (301, 302):
        answer(engine, other(seed), reused=0)
        answer(engine, [*prompt[:397], seed, 5, 6], reused=394 if engine.kv.needs_snapshots else 397)


def test_an_answer_alone_is_not_shelved(model: Any) -> None:
    engine = engine_of(model)
    prompt = random_ids(300)
    sequence = engine.join([*prompt, 7, 8], greedy(model, 270), reuse=True)
    finish(engine, sequence)
    engine.leave(sequence)
    answer(engine, [*prompt, 9, 10, 11], reused=296 if engine.kv.needs_snapshots else 300)
    assert shelved(engine) == 0


def test_a_prompt_that_keeps_the_beginning_of_another_does_not_end_it(model: Any) -> None:
    """As a request for a title, with the same system prompt."""
    engine = engine_of(model)
    system = random_ids(300)
    first = answer(engine, [*system, *random_ids(280, seed=1)])
    answer(engine, [*system, *random_ids(20, seed=2)])
    answer(engine, [*first.ids, 5, 6], reused=len(first.ids) - 1)


def test_the_budget_bounds_it(mixtral: Any) -> None:
    one = engine_of(mixtral)
    answer(one, random_ids(300, seed=1))
    engine = engine_of(mixtral, shelf_bytes=2 * one.kv.saved_bytes(0) + 1000)
    firsts = [answer(engine, [seed, *random_ids(299, seed=seed)]) for seed in (1, 2, 3)]
    answer(engine, other(301))
    assert shelved(engine) == 2
    for number, reused in ((1, 303), (2, 303), (0, 0)):
        answer(engine, [*firsts[number].ids, 5], reused=reused)
    assert engine._rows._shelf.nbytes <= 2 * one.kv.saved_bytes(0) + 1000


def test_memory_that_others_took_is_left_to_them(mixtral: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(mixtral)
    monkeypatch.setattr(shelf, "free_ram", lambda: 10_000)
    answer(engine, random_ids(300))
    answer(engine, other(301))
    assert shelved(engine) == 0


def test_what_is_not_to_be_shared_is_not_shelved(mixtral: Any) -> None:
    engine = engine_of(mixtral)
    for _ in range(2):
        answer(engine, random_ids(300), reused=0, reuse=False)
    assert shelved(engine) == 0
    answer(engine, random_ids(300, seed=1))
    answer(engine, other(301))
    assert shelved(engine) == 1
    engine.forget()
    answer(engine, random_ids(300, seed=1), reused=0)


def test_caches_that_cannot_be_copied_are_not_shelved() -> None:
    hf = tiny_models.tiny_model("qwen3_next")
    engine = Engine(hf, OwnCaches(hf.config, 1, 600), chunk=512, shelf_bytes=PLENTY)
    answer(engine, random_ids(300), reused=0)
    answer(engine, other(301), reused=0)
    assert shelved(engine) == 0


def test_a_copy_back_that_fails_loses_no_row(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model)
    first = answer(engine, random_ids(300))
    answer(engine, other(301))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", fail)
        with pytest.raises(MemoryError, match="in the middle"):
            engine.join([*first.ids, 5], greedy(model, 2), reuse=True)
    engine.check_integrity()
    assert (engine.active, engine.free_rows) == ([], 1)
    answer(engine, [*first.ids, 5], reused=len(first.ids) - 1)


def test_a_prompt_does_not_fail_for_want_of_memory_to_keep_another(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(mixtral)
    first = answer(engine, random_ids(300))
    with monkeypatch.context() as patch:
        patch.setattr(engine.kv, "save", fail)
        answer(engine, other(301), reused=0)
    assert "a conversation is not kept: in the middle" in caplog.text
    answer(engine, [*first.ids, 5], reused=0)


def test_what_a_prompt_is_to_go_on_from_counts_in_the_budget(mixtral: Any) -> None:
    """It stays on the shelf, though the row that gives way would have room in its place."""
    one = engine_of(mixtral)
    answer(one, random_ids(300))
    engine = engine_of(mixtral, shelf_bytes=one.kv.saved_bytes(0) * 3 // 2)
    first = answer(engine, [1, *random_ids(299, seed=1)])
    second = answer(engine, [2, *random_ids(299, seed=2)])
    answer(engine, [*first.ids, 5], reused=len(first.ids) - 1)
    [kept] = engine._rows._shelf._shelved
    assert kept.ids == first.ids != second.ids


def test_a_long_row_is_not_copied_for_the_sake_of_few_tokens(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a template leaves out the thoughts of all turns but the last."""
    monkeypatch.setattr(shelf, "COPIED", 2)
    engine = engine_of(mixtral)
    first = answer(engine, random_ids(800))
    answer(engine, [*first.ids[:500], 5], reused=500)
    assert shelved(engine) == 0


def test_what_a_row_no_longer_has_does_not_replace_what_is_shelved(mixtral: Any) -> None:
    """A later turn whose row went lost in failed steps, and which was given up early in its prompt."""
    engine = engine_of(mixtral, chunk=300)
    first = answer(engine, random_ids(700))
    answer(engine, other(301))
    later = engine.join([*first.ids, 5, 6], greedy(mixtral, 2), reuse=True)
    engine.kv.shorten(later.row, 0)
    engine.step()
    engine.leave(later)
    answer(engine, other(302))
    answer(engine, [*first.ids, 5, 6], reused=len(first.ids) - 1)


@pytest.mark.parametrize("seed", range(2))
def test_conversations_at_random(model: Any, seed: int) -> None:
    """Three that take turns in two rows, are edited, and begin anew; the shelf holds about two."""
    chance = random.Random(seed)
    probe = engine_of(model)
    answer(probe, random_ids(350))
    budget = 2 * probe.kv.saved_bytes(0)
    engine = engine_of(model, rows=2, shelf_bytes=budget, chunk=chance.choice([100, 512]))
    stems = [[number, *random_ids(400, seed=number)] for number in range(3)]
    prompts = [
        [*chance.choice(stems)[: chance.randint(280, 400)], *random_ids(chance.randint(1, 90), seed=number)]
        for number in range(16)
    ]
    done = answered_at_random(engine, prompts, chance, most=6)
    assert engine._rows._shelf.nbytes <= budget
    assert sum(sequence.reused_tokens for sequence in done) > 0
    check_alone(model, done)


def test_a_loaded_model_has_a_shelf_of_what_its_plan_leaves_over() -> None:
    computed: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        computed.append(kwargs["input_ids"].numel())

    long = "What is an expert, and why does prefetch help? " * 40
    for kept in (True, False):
        with moe_local.load("demo", device="cpu", ram="1GiB") as model:
            assert model.parts.engine._rows._shelf._budget == model.plan.shelf_bytes > 2**25
            if not kept:  # as where experts take all of it
                model.parts.engine._rows._shelf._budget = 0
            model.hf.register_forward_pre_hook(count, with_kwargs=True)
            for prompt in (long, "hello", long):
                computed.clear()
                model.generate(prompt, max_new_tokens=2, do_sample=False)
            assert (sum(computed) < 8) == kept
