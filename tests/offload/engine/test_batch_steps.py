"""Sequences that are stepped together: each has the logits that it has alone, whoever joins or leaves."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import moe_local
from moe_local.offload.dense.attention import NAME
from moe_local.offload.engine import batch_view
from moe_local.offload.engine.batch_view import BatchMasks, BatchPlaces
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.engine.sequence import Sequence
from support import tiny_models
from support.engine_runs import greedy, random_ids

torch.set_num_threads(1)
TOLERANCE = 2e-4
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral-window": {"sliding_window": 8},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 8},
    "deepseek_v3": {},
    "qwen3_next": {},
}


OTHERS = (
    *("qwen2_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v32", "deepseek_v4", "gemma4", "glm4_moe"),
    *("olmoe", "phimoe", "granitemoe", "minimax_m2", "ernie4_5_moe", "jamba", "granitemoehybrid", "lfm2_moe"),
)
"""Other families, and two that are not named; Llama 4's checkpoints are tested whole (test_families.py)."""


@pytest.fixture(
    scope="module", params=[*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.tiny_model(request.param.split("-")[0], **CASES.get(request.param, {}))


@torch.inference_mode()
def reference(model: Any, ids: list[int], prompt_len: int) -> torch.Tensor:
    """Logits behind the prompt and behind each later id: of one forward, or where layers keep a state, which
    round differently for one token than for many, token by token."""
    if "linear_attention" not in (getattr(model.config, "layer_types", None) or ()):
        one: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, prompt_len - 1 :]
        return one
    cache = DynamicCache(config=model.config)
    parts = [ids[:prompt_len], *([token] for token in ids[prompt_len:])]
    outputs = (model(input_ids=torch.tensor([part]), past_key_values=cache) for part in parts)
    return torch.stack([output.logits[0, -1] for output in outputs])


class Watched:
    """An engine that notes the logits of every new token, and what each forward computed."""

    def __init__(self, model: Any, rows: int, capacity: int, chunk: int) -> None:
        self.engine = Engine(model, make_kv(model, rows, capacity), chunk=chunk)
        self.model = model
        self.logits: dict[Sequence, list[torch.Tensor]] = {}
        self.forwards: list[tuple[int, int]] = []
        self._last: list[torch.Tensor] = []

    def note(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.forwards.append(tuple(kwargs["input_ids"].shape))
        self._last = list(output.logits[:, -1])

    def __enter__(self) -> Watched:
        self._hook = self.model.register_forward_hook(self.note, with_kwargs=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def step(self) -> int:
        steps = self.engine.step()
        self.engine.check_integrity()
        if steps:
            assert len(steps) == len(self._last)
            for step, logits in zip(steps, self._last, strict=True):
                self.logits.setdefault(step.sequence, []).append(logits)
        return len(steps)

    def check(self, sequence: Sequence) -> None:
        """The logits of all its new tokens are those that its ids have alone, whose likeliest they are."""
        alone = reference(self.model, sequence.ids[:-1], sequence.prompt_len)
        together = torch.stack(self.logits[sequence])
        torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)
        assert sequence.new_ids == alone.argmax(-1).tolist()


def test_all_that_decode_take_part_in_one_forward(model: Any) -> None:
    with Watched(model, rows=4, capacity=64, chunk=16) as watched:
        lengths = (3, 17, 9, 1)
        sequences = [
            watched.engine.join(random_ids(n, seed=i), greedy(model, 14)) for i, n in enumerate(lengths)
        ]
        while any(sequence.finish_reason is None for sequence in sequences):
            watched.step()
        for sequence in sequences:
            watched.check(sequence)
        batches = [rows for rows, _ in watched.forwards if rows > 1]
        if not watched.engine.kv.can_batch:  # DeepSeek V4: one after the other
            assert batches == []
            return
    assert max(batches) == 4
    assert sum(batches) > 0.8 * 4 * 14


@pytest.mark.parametrize("seed", range(2))
def test_anybody_may_join_and_leave(model: Any, seed: int) -> None:
    chance = random.Random(seed)
    waiting = [random_ids(chance.randint(1, 24), seed=100 * seed + index) for index in range(6)]
    running: list[Sequence] = []
    done: list[Sequence] = []
    with Watched(model, rows=3, capacity=60, chunk=7) as watched:
        engine = watched.engine
        while waiting or running:
            if waiting and engine.free_rows and chance.random() < 0.4:
                settings = greedy(model, chance.randint(1, 16))
                running.append(engine.join(waiting.pop(), settings, reuse=chance.random() < 0.5))
            watched.step()
            for sequence in list(running):
                if sequence.finish_reason or chance.random() < 0.02:
                    engine.leave(sequence)
                    running.remove(sequence)
                    done.append(sequence)
        for sequence in done:
            if sequence.new_ids:
                watched.check(sequence)
    assert any(rows > 1 for rows, _ in watched.forwards) == engine.kv.can_batch


def test_a_failed_step_of_several_leaves_them_as_they_were(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with Watched(model, rows=3, capacity=64, chunk=16) as watched:
        sequences = [watched.engine.join(random_ids(5 + i, seed=i), greedy(model, 8)) for i in range(3)]
        for count in range(100):
            if all(sequence.finish_reason for sequence in sequences):
                break
            if count % 4 == 3:
                hook = model.lm_head.register_forward_pre_hook(fail)
                before = [list(sequence.ids) for sequence in sequences]
                with pytest.raises(RuntimeError, match="in the middle"):
                    watched.engine.step()
                hook.remove()
                watched.engine.check_integrity()
                assert [sequence.ids for sequence in sequences] == before
            watched.step()
        for sequence in sequences:
            watched.check(sequence)


def test_a_long_prompt_lets_the_others_go_on(mixtral: Any) -> None:
    with Watched(mixtral, rows=3, capacity=200, chunk=10) as watched:
        engine = watched.engine
        short = [engine.join(random_ids(3, seed=i), greedy(mixtral, 30)) for i in range(2)]
        watched.step()
        watched.step()
        long = engine.join(random_ids(90, seed=9), greedy(mixtral, 2))
        watched.forwards.clear()
        while not long.new_ids:
            watched.step()
        assert [rows for rows, _ in watched.forwards[:16]] == [1, 2] * 8
        assert all(len(sequence.new_ids) >= 9 for sequence in short)


def test_rows_move_only_when_somebody_comes_or_goes(mixtral: Any) -> None:
    with Watched(mixtral, rows=4, capacity=64, chunk=32) as watched:
        engine = watched.engine
        swaps: list[tuple[int, int]] = []
        swap = engine.kv.swap
        engine.kv.swap = lambda one, other: (swaps.append((one, other)), swap(one, other))[1]  # type: ignore[method-assign]
        sequences = [engine.join(random_ids(4, seed=i), greedy(mixtral, 20)) for i in range(4)]
        for _ in range(12):
            watched.step()
        assert swaps == []
        engine.leave(sequences[0])  # parked: its row waits behind those that decode
        for _ in range(5):
            watched.step()
        assert swaps == [(0, 3)]
        follower = engine.join(sequences[0].ids, greedy(mixtral, 5), reuse=True)
        assert follower.reused_tokens > 0
        while any(s.finish_reason is None for s in (*sequences[1:], follower)):
            watched.step()
        for sequence in (*sequences[1:], follower):
            watched.check(sequence)


def test_sampling_is_each_ones_own(mixtral: Any) -> None:
    """A seeded answer does not depend on who else is there."""

    def answer(others: int) -> list[int]:
        engine = Engine(mixtral, make_kv(mixtral, 4, 64), chunk=16)
        prompt = random_ids(6, seed=5)
        options = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": True, "temperature": 1.5}
        mine = engine.join(prompt, make_settings(mixtral, prompt, seed=11, **options))
        for index in range(others):
            other = random_ids(7, seed=index)
            engine.join(other, make_settings(mixtral, other, seed=index, **options))
        while mine.finish_reason is None:
            engine.step()
        return mine.new_ids

    assert answer(0) == answer(3)


def test_columns_that_nobody_wrote_do_not_matter(mixtral: Any) -> None:
    kv = make_kv(mixtral, 3, 64)
    for store in kv.layers:
        for tensor in store.tensors():
            tensor.fill_(float("nan"))
    engine = Engine(mixtral, kv, chunk=16)
    sequences = [engine.join(random_ids(n, seed=n), greedy(mixtral, 10)) for n in (2, 30, 11)]
    while any(sequence.finish_reason is None for sequence in sequences):
        engine.step()  # raises for NaN
    engine.check_integrity()


def test_an_expert_is_brought_once_for_all_that_step_together(tiny_mixtral: Path) -> None:
    """Four of one mind, a token apart from each other, bring fewer than four times what one of them does."""
    missed: list[int] = []
    for rows in (1, 4):
        options = {"slots": 2, "device": "cpu", "dense": "fp32", "parallel": 4, "prefetch": "off"}
        with moe_local.load(str(tiny_mixtral), **options) as loaded:
            engine, store = loaded.parts.engine, loaded.parts.store
            same = [engine.join(random_ids(5, seed=1), greedy(loaded.hf, 30)) for _ in range(rows)]
            while any(not sequence.new_ids for sequence in same):
                engine.step()
            while len(same[-1].new_ids) < 2:
                engine.step()
            before = store.tally().misses
            for _ in range(20):
                assert len(engine.step()) == rows
            missed.append(store.tally().misses - before)
            store.check_integrity()
    one, four = missed
    assert one < four < 0.8 * 4 * one


def test_masks_of_chunks_do_not_ask_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose function fails for Llama 4 in 5.17."""

    def fails(**_: Any) -> None:
        raise TypeError("unexpected keyword argument 'block_sequence_ids'")

    monkeypatch.setattr(batch_view, "create_masks_for_generate", fails)
    config = SimpleNamespace(
        layer_types=["chunked_attention", "full_attention"],
        attention_chunk_size=4,
        _attn_implementation="sdpa",
    )
    hf = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda decoder: config),
        get_input_embeddings=lambda: torch.nn.Embedding(1, 1),
    )
    places = BatchPlaces()
    places.set([5, 2], torch.device("cpu"))
    masks = BatchMasks(hf, [4, None]).make(places)
    seen = {name: [row.nonzero().flatten().tolist() for row in mask[:, 0, 0]] for name, mask in masks.items()}
    assert seen == {
        "chunked_attention": [[4, 5], [0, 1, 2]],
        "full_attention": [[0, 1, 2, 3, 4, 5], [0, 1, 2]],
    }
    config._attn_implementation = NAME
    for name, added in BatchMasks(hf, [4, None]).make(places).items():
        assert torch.equal(added == 0, masks[name])
        assert torch.equal(added < -1e38, ~masks[name])
