"""Log probabilities of tokens against the model's own forward, whatever the tokens are picked by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.offload.engine import logprobs, picking
from moe_local.offload.engine.batch import generate_ids
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.logprobs import LogProbs, log_probabilities, look_up
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.engine.sequence import Sequence
from support.engine_runs import random_ids

torch.set_num_threads(1)
TOLERANCE = 2e-4
ENDLESS = {"eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 1.7, "top_k": 9, "repetition_penalty": 1.9, "seed": 3}
"""What changes the scores that a token is drawn from, as far as there are options for it."""


def joined(engine: Engine, length: int, logprobs: int | None, count: int = 6, **options: Any) -> Sequence:
    ids = random_ids(length)
    settings = make_settings(engine.hf, ids, max_new_tokens=count, logprobs=0, **ENDLESS, **options)
    settings.logprobs = logprobs  # beyond 20, too: of all ids
    return engine.join(ids, settings)


def run(engine: Engine) -> dict[int, list[LogProbs | None]]:
    """What the steps said of each sequence's tokens, by the sequence's identity."""
    found: dict[int, list[LogProbs | None]] = {id(sequence): [] for sequence in engine.active}
    while any(sequence.finish_reason is None for sequence in engine.active):
        for step in engine.step():
            found[id(step.sequence)].append(step.logprobs)
    return found


def reference(hf: Any, sequence: Sequence) -> torch.Tensor:
    """[new tokens, vocabulary], by one forward of the model itself."""
    with torch.inference_mode():
        logits = hf(input_ids=torch.tensor([sequence.ids[:-1]])).logits[0]
    return torch.log_softmax(logits[sequence.prompt_len - 1 :].float(), dim=-1)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_they_are_the_models_own(hf: Any, rows: int, options: dict[str, Any]) -> None:
    engine = Engine(hf, make_kv(hf, rows, 64), chunk=8)
    vocabulary = engine.vocab_size
    asked = [vocabulary, 5, 0][:rows]
    sequences = [joined(engine, 21 - 5 * row, asked[row], **options) for row in range(rows)]
    found = run(engine)
    for sequence, count in zip(sequences, asked, strict=True):
        want = reference(hf, sequence)
        got = found[id(sequence)]
        assert len(got) == len(sequence.new_ids) == 6
        for place, (token, one) in enumerate(zip(sequence.new_ids, got, strict=True)):
            assert one is not None
            assert one.logprob == pytest.approx(float(want[place, token]), abs=TOLERANCE)
            assert len(one.top_logprobs) == count
            values = [value for _, value in one.top_logprobs]
            assert values == sorted(values, reverse=True)
            torch.testing.assert_close(
                torch.tensor(values), want[place].sort(descending=True).values[:count], atol=TOLERANCE, rtol=0
            )
            for other, value in one.top_logprobs:
                assert value == pytest.approx(float(want[place, other]), abs=TOLERANCE)
            if count == vocabulary:
                assert {other for other, _ in one.top_logprobs} == set(range(vocabulary))
                assert dict(one.top_logprobs)[token] == one.logprob
                assert math.fsum(math.exp(value) for value in values) == pytest.approx(1, abs=1e-5)
            if count and not options:
                assert one.top_logprobs[0] == (token, one.logprob)


def test_they_change_no_token_and_only_rows_that_ask_pay(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid: list[int] = []

    def counted(logits: torch.Tensor) -> torch.Tensor:
        paid.append(logits.numel())
        return log_probabilities(logits)

    def answers(asked: list[int | None]) -> tuple[list[list[int]], list[list[bool]]]:
        engine = Engine(mixtral, make_kv(mixtral, len(asked), 64), chunk=64)
        sequences = [joined(engine, 9 + row, some, **SAMPLED) for row, some in enumerate(asked)]
        found = run(engine)
        told = [[one is not None for one in found[id(sequence)]] for sequence in sequences]
        return [sequence.new_ids for sequence in sequences], told

    monkeypatch.setattr(picking, "log_probabilities", counted)
    plain, told = answers([None, None])
    assert not paid
    assert told == [[False] * 6] * 2
    ids, told = answers([None, 2])
    assert paid == [mixtral.config.vocab_size] * 6
    assert told == [[False] * 6, [True] * 6]
    assert ids == plain


def test_what_changes_logits_in_place_does_not_change_them(mixtral: Any) -> None:
    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, :300] = -math.inf
        return scores

    engine = Engine(mixtral, make_kv(mixtral, 1, 64), chunk=64)
    sequence = joined(engine, 9, 3)
    sequence.settings.processors = forbid
    found = run(engine)[id(sequence)]
    want = reference(mixtral, sequence)
    assert min(sequence.new_ids) >= 300
    for place, (token, one) in enumerate(zip(sequence.new_ids, found, strict=True)):
        assert one is not None
        assert one.logprob == pytest.approx(float(want[place, token]), abs=TOLERANCE)
        assert [other for other, _ in one.top_logprobs] == want[place].topk(3).indices.tolist()


def test_of_equals_the_lowest_ids() -> None:
    table = torch.log_softmax(torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, -math.inf]), dim=-1)
    for count in range(1, 8):
        top = look_up(table, 4, count).top_logprobs
        assert [token for token, _ in top] == [1, 3, 6, 2, 4, 5, 0][:count]
        assert top[0][0] == int(table.argmax())
    assert look_up(table, 4, 0) == LogProbs(float(table[4]), ())
    assert look_up(table, 7, 20).logprob == -math.inf
    assert [token for token, _ in look_up(table, 7, 20).top_logprobs] == [1, 3, 6, 2, 4, 5, 0, 7]


@pytest.mark.parametrize("length", [1, 2, 9, 33])
@pytest.mark.parametrize("chunk", [4, 64])
def test_those_of_a_prompt(hf: Any, monkeypatch: pytest.MonkeyPatch, length: int, chunk: int) -> None:
    """In whatever pieces it is computed, beside others, and after one that had the same beginning."""
    monkeypatch.setattr(logprobs, "SCORED_BYTES", 16 * 4 * hf.config.vocab_size)
    monkeypatch.setattr(logprobs, "PIECE", 5)
    engine = Engine(hf, make_kv(hf, 2, 64), chunk=chunk)
    ids = random_ids(40)[:length]
    for _ in range(2):
        settings = make_settings(hf, ids, max_new_tokens=3, logprobs=4, **ENDLESS, **SAMPLED)
        settings.prompt_logprobs = True
        sequence = engine.join(ids, settings, reuse=True)
        other = engine.join(ids, make_settings(hf, ids, max_new_tokens=9, **ENDLESS), reuse=True)
        run(engine)
        assert sequence.reused_tokens == 0
        assert not other.prompt_logprobs
        with torch.inference_mode():
            logits = hf(input_ids=torch.tensor([sequence.ids])).logits[0]
        want = torch.log_softmax(logits.float(), dim=-1)
        assert len(sequence.prompt_logprobs) == length - 1
        for place, one in enumerate(sequence.prompt_logprobs):
            assert one.logprob == pytest.approx(float(want[place, ids[place + 1]]), abs=TOLERANCE)
            best = want[place].topk(4).values.tolist()
            assert [value for _, value in one.top_logprobs] == pytest.approx(best, abs=TOLERANCE)
        for one_of_both in (sequence, other):
            engine.leave(one_of_both)
        assert not sequence.prompt_logprobs  # a parked row keeps none


def test_a_prompt_that_is_computed_again_has_them_once(hf: Any) -> None:
    engine = Engine(hf, make_kv(hf, 1, 64), chunk=4)
    ids = random_ids(11)
    settings = make_settings(hf, ids, max_new_tokens=2, logprobs=1, **ENDLESS)
    settings.prompt_logprobs = True
    sequence = engine.join(ids, settings)
    engine.step()
    first = list(sequence.prompt_logprobs)
    assert len(first) == 4
    engine.kv.shorten(sequence.row, 0)  # as memory of states has it after a step that failed
    run(engine)
    assert len(sequence.prompt_logprobs) == 10
    for one, again in zip(first, sequence.prompt_logprobs, strict=False):
        assert one.logprob == pytest.approx(again.logprob, abs=TOLERANCE)


def test_models_that_read_prompts_in_one_piece_refuse_those_of_a_prompt(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(mixtral, make_kv(mixtral, 1, 64), chunk=4)
    monkeypatch.setattr(engine.kv, "whole_prompt_only", True, raising=False)
    settings = make_settings(mixtral, [5, 6], max_new_tokens=2, logprobs=1)
    settings.prompt_logprobs = True
    with pytest.raises(OptionError, match="reads prompts in one piece"):
        engine.join([5, 6], settings)
    engine.join([5, 6], make_settings(mixtral, [5, 6], max_new_tokens=2, logprobs=1))


def test_a_tensor_of_ids_has_no_place_for_them(mixtral: Any) -> None:
    engine = Engine(mixtral, make_kv(mixtral, 1, 64), chunk=64)
    ids = torch.tensor([random_ids(5)])
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(OptionError, match="logprobs cannot be given with a tensor of ids"):
            generate_ids(engine, ids, logprobs=2, max_new_tokens=2, **options)
    assert generate_ids(engine, ids, logprobs=None, max_new_tokens=2, **ENDLESS).shape == (1, 7)


def test_a_loaded_model_hands_them_out(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
    with moe_local.load(tiny_mixtral, slots=3, context=64, experts="fp32", dense="fp32") as model:
        plain = model.generate("the experts", max_new_tokens=5, **ENDLESS)
        assert plain.logprobs is None
        assert "logprobs" not in plain.to_dict()
        output = model.generate("the experts", max_new_tokens=5, logprobs=2, **ENDLESS)
        assert output.token_ids == plain.token_ids
        assert output.logprobs is not None
        tokens = list(model.stream("the experts", max_new_tokens=5, logprobs=2, **ENDLESS))
        assert [(token.logprob, token.top_logprobs) for token in tokens] == output.logprobs
        assert [one.top_logprobs[0] for one in output.logprobs] == [(t.id, t.logprob) for t in tokens]
        written = json.loads(json.dumps(output.to_dict()))["logprobs"]
        assert written[0] == {
            "logprob": tokens[0].logprob,
            "top_logprobs": [list(pair) for pair in tokens[0].top_logprobs or ()],
        }
        (bare,) = model.stream("the experts", max_new_tokens=1, logprobs=0)
        assert (bare.logprob, bare.top_logprobs) == (tokens[0].logprob, ())
        (none,) = model.stream("the experts", max_new_tokens=1)
        assert (none.logprob, none.top_logprobs) == (None, None)
        for wrong in (21, -1, 1.5, True, "5"):
            with pytest.raises(OptionError, match=r"logprobs is .* it must be a whole number, from 0 to 20"):
                model.stream("the experts", logprobs=wrong)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="num_beams cannot be used with text"):
            model.generate("the experts", logprobs=1, num_beams=2)
        with pytest.raises(OptionError, match="did you mean logprobs"):
            model.generate("the experts", log_probs=1)
        with pytest.raises(OptionError, match="unknown generation option 'prompt_logprobs'"):
            model.generate("the experts", prompt_logprobs=True)
