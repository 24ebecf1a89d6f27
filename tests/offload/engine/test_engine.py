"""The decode loop against transformers' generate, token by token and by logits."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.own_caches import OwnCaches
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.engine.sequence import FinishReason
from moe_local.offload.system import interrupt
from support import engine_runs, tiny_models
from support.engine_runs import finish, greedy, random_ids

torch.set_num_threads(1)
TOLERANCE = 2e-4
CASES = {
    "mixtral": {},
    "mixtral-window": {"sliding_window": 8},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 8},
}


@pytest.fixture(scope="module", params=list(CASES))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.tiny_model(request.param.split("-")[0], **CASES[request.param])


def hf_ids(model: Any, ids: list[int], **options: Any) -> list[int]:
    """New tokens of transformers' generate; the mask keeps it from hiding ids equal to the pad token."""
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    new: list[int] = out[0, len(ids) :].tolist()
    return new


@contextmanager
def raising(module: torch.nn.Module, error: type[BaseException] = RuntimeError) -> Iterator[None]:
    """The module fails whenever it is called."""

    def fail(*_: Any) -> None:
        raise error("in the middle")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def test_greedy_equals_generate(model: Any) -> None:
    ids = random_ids(33)
    engine = Engine(model, make_kv(model, 1, 64), chunk=10)
    sequence = engine.join(ids, greedy(model, 30))
    steps = []
    while sequence.finish_reason is None:
        steps += engine.step()
    assert sequence.new_ids == hf_ids(model, ids, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert [step.token for step in steps] == sequence.new_ids
    assert [step.finish_reason for step in steps] == [None] * 29 + [FinishReason.LENGTH]
    assert sequence.prompt_len == 33


def test_a_prompt_of_thousands_in_chunks(mixtral: Any) -> None:
    ids = random_ids(3000)
    for model in (mixtral, tiny_models.tiny_model("mixtral", num_hidden_layers=2, sliding_window=8)):
        engine = Engine(model, make_kv(model, 1, 3010), chunk=256)
        seen: list[torch.Tensor] = []
        hook = model.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.logits[0, -1]))
        sequence = engine.join(ids, greedy(model, 4))
        finish(engine, sequence)
        hook.remove()
        assert len(seen) == 12 + 3
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([sequence.ids[:-1]])).logits[0]
        torch.testing.assert_close(torch.stack(seen[11:]), logits[2999:], rtol=0, atol=TOLERANCE)
        assert sequence.new_ids == logits[2999:].argmax(-1).tolist()


@hypothesis_settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_joining_and_leaving_changes_nobody(mixtral: Any, seed: int) -> None:
    chance = random.Random(seed)
    engine = Engine(mixtral, make_kv(mixtral, 3, 40), chunk=5)
    waiting = [random_ids(chance.randint(1, 20), seed=seed + index) for index in range(6)]
    done = engine_runs.answered_at_random(engine, waiting, chance, most=8)
    engine_runs.check_alone(mixtral, done)


def test_rows_are_served_in_turn(mixtral: Any) -> None:
    """A long prompt does not hold up the others: they get a step between its chunks."""
    engine = Engine(mixtral, make_kv(mixtral, 2, 100), chunk=8)
    short = engine.join(random_ids(3), greedy(mixtral, 6))
    engine.step()
    long = engine.join(random_ids(80), greedy(mixtral, 2))
    order = [step.sequence for _ in range(20) for step in engine.step()]
    assert order[:5] == [short] * 5
    assert order[5:] == [long] * 2


def test_the_context_ends_a_sequence(mixtral: Any) -> None:
    ids = random_ids(12)
    engine = Engine(mixtral, make_kv(mixtral, 1, 16), chunk=64)
    sequence = engine.join(ids, greedy(mixtral, 100))
    finish(engine, sequence)
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.new_ids == hf_ids(mixtral, ids, max_new_tokens=5, eos_token_id=None)
    engine.leave(sequence)
    full = engine.join(random_ids(16), greedy(mixtral, 100))
    finish(engine, full)
    assert len(full.new_ids) == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ([5] * 17, "the prompt has 17 tokens, the context holds 16; shorten it or raise --context"),
        ([5, 320], "token id 320 in the prompt is outside the vocabulary, 0 to 319"),
        ([-1], "token id -1"),
    ],
)
def test_prompts_that_can_not_be_run(mixtral: Any, ids: list[int], message: str) -> None:
    engine = Engine(mixtral, make_kv(mixtral, 1, 16), chunk=8)
    with pytest.raises(OptionError, match=message):
        engine.join(ids, greedy(mixtral, 1))
    assert engine.free_rows == 1


def test_a_prompt_that_is_too_long_is_told_how_far_the_context_can_be_raised(mixtral: Any) -> None:
    engine = Engine(mixtral, make_kv(mixtral, 1, 16), chunk=8)
    remedies = {32: "shorten it or raise --context, 32 at most", 16: "shorten it: the model takes no more"}
    for most, remedy in remedies.items():
        engine.most_context = most
        with pytest.raises(OptionError, match=f"the context holds 16; {remedy}"):
            engine.join([5] * 17, greedy(mixtral, 1))


def test_no_row_left(mixtral: Any) -> None:
    engine = Engine(mixtral, make_kv(mixtral, 1, 16), chunk=8)
    engine.join([5], greedy(mixtral, 1))
    with pytest.raises(MoeLocalError, match="all 1 sequences are in use"):
        engine.join([5], greedy(mixtral, 1))


def test_eos_and_max_time(mixtral: Any) -> None:
    ids = random_ids(9)
    expected = hf_ids(mixtral, ids, max_new_tokens=8, eos_token_id=None)
    engine = Engine(mixtral, make_kv(mixtral, 2, 64), chunk=8)
    stopped = engine.join(ids, make_settings(mixtral, ids, max_new_tokens=8, eos_token_id=[319, expected[4]]))
    timed = engine.join(ids, make_settings(mixtral, ids, max_time=0.0, eos_token_id=None))
    finish(engine, stopped, timed)
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.new_ids == expected[: expected.index(expected[4]) + 1]
    assert timed.finish_reason is FinishReason.LENGTH
    assert timed.new_ids == expected[:1]


def test_the_end_token_counts_before_the_length(mixtral: Any) -> None:
    ids = random_ids(9)
    first = hf_ids(mixtral, ids, max_new_tokens=1, eos_token_id=None)[0]
    engine = Engine(mixtral, make_kv(mixtral, 1, 64), chunk=8)
    sequence = engine.join(ids, make_settings(mixtral, ids, max_new_tokens=1, eos_token_id=first))
    finish(engine, sequence)
    assert sequence.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("own_caches", [False, True])
def test_a_failing_step_leaves_every_sequence_as_it_was(model: Any, own_caches: bool) -> None:
    kv = OwnCaches(model.config, 2, 64) if own_caches else make_kv(model, 2, 64)
    engine = Engine(model, kv, chunk=6)
    ids = [random_ids(14), random_ids(7, seed=1)]
    sequences = [engine.join(prompt, greedy(model, 6)) for prompt in ids]
    last_layer = model.model.layers[-1]
    for count in range(60):
        if all(sequence.finish_reason for sequence in sequences):
            break
        if count % 5 == 3:
            with raising(last_layer), pytest.raises(RuntimeError, match="in the middle"):
                engine.step()
        engine.check_integrity()
        engine.step()
    for prompt, sequence in zip(ids, sequences, strict=True):
        assert sequence.new_ids == hf_ids(model, prompt, max_new_tokens=6, eos_token_id=None)


def test_ctrl_c_in_mid_token(mixtral: Any) -> None:
    """A real SIGINT inside the first layer; the second layer's safe point raises it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ids = random_ids(20)
    engine = Engine(mixtral, make_kv(mixtral, 1, 64), chunk=6)
    sequence = engine.join(ids, greedy(mixtral, 12))
    layers = mixtral.model.layers
    reached: list[int] = []
    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT)),
        layers[0].register_forward_hook(lambda *_: reached.append(0)),
        layers[1].register_forward_pre_hook(lambda *_: interrupt.check()),
        layers[1].register_forward_hook(lambda *_: reached.append(1)),
    ]
    try:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                engine.step()
            engine.check_integrity()
    finally:
        for hook in hooks:
            hook.remove()
        signal.signal(signal.SIGINT, before)
    assert reached == [0, 0, 0], "the signal was held back, then the rest of the forward was skipped"
    assert engine.kv.lens == [0]
    finish(engine, sequence)
    assert sequence.new_ids == hf_ids(mixtral, ids, max_new_tokens=12, eos_token_id=None)


def test_nan_is_an_error_and_not_a_token() -> None:
    model = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    engine = Engine(model, make_kv(model, 1, 64), chunk=6)
    good = model.lm_head.weight[7, 3].item()
    for options in ({"do_sample": False}, {"do_sample": True, "seed": 1}):
        with torch.no_grad():
            model.lm_head.weight[7, 3] = float("nan")
        sequence = engine.join([5, 6, 7], make_settings(model, [5, 6, 7], eos_token_id=None, **options))
        with pytest.raises(MoeLocalError, match="NaN at position 2"):
            engine.step()
        assert sequence.new_ids == []
        with torch.no_grad():
            model.lm_head.weight[7, 3] = good
        assert len(engine.step()) == 1
        engine.leave(sequence)


def counted(model: Any) -> tuple[list[int], Any]:
    """Tokens of each forward from now on, and the hook to remove."""
    counts: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].shape[1])

    return counts, model.register_forward_pre_hook(count, with_kwargs=True)


def test_the_next_turn_reuses_the_row(model: Any) -> None:
    """The conversation goes on: only what is new is computed, and the logits are those of a new start."""
    engine = Engine(model, make_kv(model, 2, 200), chunk=100)
    turn = random_ids(30)
    sequence = engine.join(turn, greedy(model, 10))
    finish(engine, sequence)
    engine.leave(sequence)
    assert engine.free_rows == 2
    # templates rewrite the end of an answer: the last three tokens differ
    prompt = sequence.ids[:37] + random_ids(25, seed=3)
    counts, hook = counted(model)
    seen: list[torch.Tensor] = []
    logits_hook = model.register_forward_hook(lambda m, a, out: seen.append(out.logits[0, -1]))
    follower = engine.join(prompt, greedy(model, 6), reuse=True)
    assert follower.reused_tokens == 37
    finish(engine, follower)
    hook.remove()
    logits_hook.remove()
    assert counts == [25, 1, 1, 1, 1, 1]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([follower.ids[:-1]])).logits[0, len(prompt) - 1 :]
    torch.testing.assert_close(torch.stack(seen), expected, rtol=0, atol=TOLERANCE)


def test_reuse_of_the_same_prompt_and_of_none(mixtral: Any) -> None:
    engine = Engine(mixtral, make_kv(mixtral, 1, 64), chunk=100)
    ids = random_ids(20)
    first = engine.join(ids, greedy(mixtral, 5))
    finish(engine, first)
    engine.leave(first)
    again = engine.join(ids, greedy(mixtral, 5), reuse=True)
    assert again.reused_tokens == 19, "one token is computed again, for its logits"
    finish(engine, again)
    assert again.new_ids == first.new_ids
    engine.leave(again)
    other = engine.join([300, *ids], greedy(mixtral, 5), reuse=True)
    assert other.reused_tokens == 0
    finish(engine, other)
    assert other.new_ids == hf_ids(mixtral, [300, *ids], max_new_tokens=5, eos_token_id=None)
    engine.leave(other)
    engine.forget()
    assert engine.kv.lens == []


def test_an_interrupted_turn_can_be_reused(mixtral: Any) -> None:
    engine = Engine(mixtral, make_kv(mixtral, 1, 64), chunk=8)
    ids = random_ids(30)
    first = engine.join(ids, greedy(mixtral, 5))
    engine.step()
    engine.leave(first)
    again = engine.join(ids, greedy(mixtral, 5), reuse=True)
    assert again.reused_tokens == 8, "only the first chunk had been computed"
    finish(engine, again)
    assert again.new_ids == hf_ids(mixtral, ids, max_new_tokens=5, eos_token_id=None)


def test_own_caches_reuse_only_what_was_appended(mixtral: Any) -> None:
    """A state can not be cut, so a prompt serves on only if it begins with all that was computed."""
    engine = Engine(mixtral, OwnCaches(mixtral.config, 1, 64), chunk=8)
    first = engine.join(random_ids(10), greedy(mixtral, 4))
    finish(engine, first)
    engine.leave(first)
    goes_on = engine.join([*first.ids, 9, 9], greedy(mixtral, 4), reuse=True)
    assert goes_on.reused_tokens == 13
    finish(engine, goes_on)
    assert goes_on.new_ids == hf_ids(mixtral, [*first.ids, 9, 9], max_new_tokens=4, eos_token_id=None)
    engine.leave(goes_on)
    differs = engine.join(first.ids[:12], greedy(mixtral, 4), reuse=True)
    assert differs.reused_tokens == 0
    finish(engine, differs)
    assert differs.new_ids == hf_ids(mixtral, first.ids[:12], max_new_tokens=4, eos_token_id=None)


def test_conversations_in_turn_keep_their_rows(mixtral: Any) -> None:
    """A few tokens of a template in common are no reason to give another conversation's row up."""
    engine = Engine(mixtral, make_kv(mixtral, 2, 100), chunk=100)
    template = [1, 2, 3]

    def turn(prompt: list[int], reused: int) -> list[int]:
        sequence = engine.join(prompt, greedy(mixtral, 4), reuse=True)
        assert sequence.reused_tokens == reused
        finish(engine, sequence)
        assert sequence.new_ids == hf_ids(mixtral, prompt, max_new_tokens=4, eos_token_id=None)
        engine.leave(sequence)
        engine.check_integrity()
        return sequence.ids

    one = turn([*template, *random_ids(20, seed=1)], 0)
    two = turn([*template, *random_ids(20, seed=2)], 0)
    # the last new token was never fed
    one = turn([*one, *random_ids(5, seed=3)], len(one) - 1)
    two = turn([*two, *random_ids(5, seed=4)], len(two) - 1)
    three = turn([*template, *random_ids(20, seed=5)], 3)  # no row is spare: that of the one left longest ago
    turn([*two, 9], len(two) - 1)
    turn([*three, 9], len(three) - 1)


def test_no_token_is_counted_as_reused_twice(model: Any) -> None:
    """By a prompt whose row a failed step has emptied."""
    engine = Engine(model, make_kv(model, 2, 120), chunk=100)
    first, second = (engine.join(random_ids(60), greedy(model, 9), reuse=True) for _ in range(2))
    while not second.reused_tokens:
        engine.step()
    engine.kv.shorten(second.row, 0)  # as a failed exchange of rows leaves it
    finish(engine, first, second)
    assert second.reused_tokens == 59
    assert second.new_ids == first.new_ids


@pytest.mark.parametrize("chunk", [100, 16])
def test_a_prompt_in_common_is_computed_once(model: Any, chunk: int) -> None:
    """By whoever comes first, chunk by chunk; the others copy it, and get what they would alone."""
    engine = Engine(model, make_kv(model, 4, 120), chunk=chunk)
    common = random_ids(50, seed=1)
    prompts = [common, common, [*common, *random_ids(9, seed=2)], [*common[:30], *random_ids(9, seed=3)]]
    counts: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    sequences = [engine.join(prompt, greedy(model, 6), reuse=True) for prompt in prompts]
    while any(sequence.finish_reason is None for sequence in sequences):
        engine.step()
        engine.check_integrity()
    hook.remove()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.new_ids == hf_ids(model, prompt, max_new_tokens=6, eos_token_id=None)
    if engine.kv.can_copy:
        assert sum(sequence.reused_tokens for sequence in sequences) >= 49 + 48 + 28
        alone = sum(map(len, prompts)) + 4 * 5
        assert sum(counts) == alone - sum(sequence.reused_tokens for sequence in sequences)
    else:
        assert [sequence.reused_tokens for sequence in sequences] == [0] * 4


def test_prompts_are_shared_only_when_asked(mixtral: Any) -> None:
    engine = Engine(mixtral, make_kv(mixtral, 2, 100), chunk=100)
    ids = random_ids(40)
    sequences = [engine.join(ids, greedy(mixtral, 3)) for _ in range(2)]
    while any(sequence.finish_reason is None for sequence in sequences):
        engine.step()
    assert [sequence.reused_tokens for sequence in sequences] == [0, 0]
