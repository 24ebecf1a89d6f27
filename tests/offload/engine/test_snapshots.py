"""Conversations with models whose layers keep a state: what is computed again, and that nothing changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from moe_local.offload.checkpoint.spec import model_spec
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.sequence import Sequence
from moe_local.offload.engine.snapshots import Snapshots
from moe_local.offload.engine.state_slab import StateSlab
from moe_local.offload.plan.footprint import SNAPSHOTS, snapshot_bytes
from support import tiny_models
from support.engine_runs import answered_at_random, check_alone, finish, greedy, random_ids

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["qwen3_next", "nemotron_h", "lfm2_moe"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.tiny_model(request.param)


@pytest.fixture(scope="module")
def qwen3_next() -> Any:
    return tiny_models.tiny_model("qwen3_next")


def engine_of(model: Any, rows: int, *, chunk: int = 256) -> Engine:
    engine = Engine(model, make_kv(model, rows, 600), chunk=chunk)
    assert isinstance(engine.kv, StateSlab)
    return engine


def answer(engine: Engine, prompt: list[int], *, reused: int, count: int = 5) -> Sequence:
    """The sequence of a prompt that reuses so many tokens, finished, checked, and gone."""
    sequence = engine.join(prompt, greedy(engine.hf, count), reuse=True)
    finish(engine, sequence)
    assert sequence.reused_tokens == reused
    engine.leave(sequence)
    engine.check_integrity()
    check_alone(engine.hf, [sequence])
    return sequence


@pytest.mark.parametrize("rows", [1, 2])
def test_a_turn_without_the_thought_of_the_last(model: Any, rows: int) -> None:
    """The next prompt parts from the row within its last tokens, which opened a thought."""
    engine = engine_of(model, rows)
    opening = [7, 8, 9]
    said = random_ids(160)
    first = answer(engine, [*said, *opening], reused=0, count=40)
    said += random_ids(140, seed=1)
    second = answer(engine, [*said, *opening], reused=157)
    said += random_ids(30, seed=2)  # too few for another snapshot
    answer(engine, [*said, *opening], reused=297)
    answer(engine, [*said, 11, 12], reused=297)
    answer(engine, [*second.ids[: second.prompt_len], 5], reused=297)
    answer(engine, first.ids[: first.prompt_len], reused=157)  # the first answer is made anew


def test_the_second_to_part_at_a_place_leaves_a_snapshot_there(model: Any) -> None:
    engine = engine_of(model, 1)
    system = random_ids(150)
    for seed, reused in ((1, 0), (2, 0), (3, 150), (4, 150)):
        answer(engine, [*system, 300 + seed, *random_ids(140, seed=seed)], reused=reused)


def test_another_row_begins_with_a_snapshot(model: Any) -> None:
    """Of a row that has gone on meanwhile."""
    engine = engine_of(model, 3)
    prompt = random_ids(200)
    sequences = [engine.join(prompt, greedy(model, count), reuse=True) for count in (12, 3)]
    finish(engine, *sequences)
    assert [sequence.reused_tokens for sequence in sequences] == [0, 194]
    late = engine.join([*prompt[:198], 5, 6], greedy(model, 3), reuse=True)
    finish(engine, late)
    assert late.reused_tokens == 194
    check_alone(model, [*sequences, late])


def test_a_failed_step_goes_back_to_the_last_snapshot(model: Any) -> None:
    engine = engine_of(model, 1)
    sequence = engine.join(random_ids(200), greedy(model, 8), reuse=True)
    while len(sequence.new_ids) < 4:
        engine.step()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        engine.step()
    hook.remove()
    engine.check_integrity()
    assert engine.kv.lens == [194]
    finish(engine, sequence)
    check_alone(model, [sequence])


def test_prompts_that_share_nothing_are_not_cut(qwen3_next: Any) -> None:
    """As those of generate with a tensor, which reuses no row, so that no snapshot would be used."""
    engine = engine_of(qwen3_next, 1)
    sequence = engine.join(random_ids(200), greedy(qwen3_next, 2))
    engine.step()
    assert engine.kv.lens == [200]
    finish(engine, sequence)
    engine.leave(sequence)
    answer(engine, [*sequence.ids[:100], 5], reused=0)


def test_a_snapshot_that_cannot_be_put_back_leaves_an_empty_row(
    qwen3_next: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(qwen3_next, 1)
    prompt = random_ids(200)
    answer(engine, prompt, reused=0)

    def fail(*_: Any) -> None:
        raise RuntimeError("no copy")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", fail)
        with pytest.raises(RuntimeError, match="no copy"):
            engine.join([*prompt[:198], 5], greedy(qwen3_next, 3), reuse=True)
    engine.check_integrity()
    assert (engine.active, engine.kv.lens) == ([], [0])
    answer(engine, prompt, reused=0)


@pytest.mark.parametrize("seed", range(3))
def test_conversations_at_random(model: Any, seed: int) -> None:
    """Prompts that go on from parts of earlier ones; rows that join, move, and leave in between."""
    chance = random.Random(seed)
    engine = engine_of(model, 3, chunk=chance.choice([48, 256]))
    stems = [random_ids(300, seed=10 * seed), random_ids(300, seed=10 * seed + 1)]
    prompts = [
        [*chance.choice(stems)[: chance.randint(180, 300)], *random_ids(chance.randint(1, 90), seed=number)]
        for number in range(18)
    ]
    done = answered_at_random(engine, prompts, chance, most=12)
    assert sum(sequence.reused_tokens for sequence in done) > 0
    check_alone(model, done)


def test_those_give_way_that_cost_least() -> None:
    slab = [torch.zeros(2, 3), torch.zeros(2, 4, 5)]
    snapshots = Snapshots(slab, 2)
    for length in (100, 110, 300, 700, 705, 710, 900):
        for tensor in slab:
            tensor[1] = length
        snapshots.take(1, length)
        snapshots.check_integrity([0, length])
        assert snapshots.longest(1, length) == length
    # 110, 705 and 710 are at most ten tokens behind another
    kept = sorted({snapshots.longest(1, limit) for limit in range(1000)} - {0})
    assert kept == [100, 300, 700, 900]
    assert all((state == 700).all() for state in snapshots.at(1, 700))
    assert snapshots.longest(0, 1000) == 0
    assert snapshots.nbytes == SNAPSHOTS * 4 * (3 + 20)
    snapshots.swap(0, 1)
    snapshots.cut(0, 700)
    assert (snapshots.longest(0, 1000), snapshots.longest(1, 1000)) == (700, 0)
    assert snapshots.nbytes == SNAPSHOTS * 4 * (3 + 20), "memory is kept for later ones"


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h", "kimi_linear", "bailing_hybrid"])
def test_rows_take_as_much_memory_as_planned(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip("newer transformers")
    model = tiny_models.tiny_model(name)
    engine = engine_of(model, 2, chunk=16)
    without = engine.kv.nbytes
    for seed in range(4):
        answer(engine, random_ids(200, seed=seed), reused=0)
    assert engine.kv.nbytes - without == 2 * snapshot_bytes(model_spec(model.config))
