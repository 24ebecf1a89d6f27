"""A loaded model as people use it: prompts, streams, statistics, turns, Ctrl-C, close."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
from transformers import GenerationConfig

import moe_local
from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.offload.engine.sequence import FinishReason
from moe_local.offload.tiers import transfer

torch.set_num_threads(1)

EXACT = {"experts": "fp32", "dense": "fp32"}
ENDLESS = {"eos_token_id": None}
"""Tiny random models may end at any token."""


@pytest.fixture(scope="module")
def loaded(tiny_mixtral: Path, home_of_file: Path) -> Iterator[moe_local.Model]:
    with moe_local.load(tiny_mixtral, slots=3, context=256, prefetch="router", **EXACT) as model:
        yield model


@pytest.fixture
def model(loaded: moe_local.Model) -> Iterator[moe_local.Model]:
    """One model for all tests that leave it as they found it, which is checked."""
    yield loaded
    loaded.check_integrity()


def answer(model: moe_local.Model, prompt: Any, count: int = 12, **options: Any) -> Any:
    return model.generate(prompt, max_new_tokens=count, **ENDLESS, **options)


# --- prompts and answers


def test_text_is_one_user_turn(model: moe_local.Model) -> None:
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the experts"}], add_generation_prompt=True, return_dict=False
    )
    expected = answer(model, ids).token_ids
    assert answer(model, "the experts").token_ids == expected
    assert answer(model, [{"role": "user", "content": "the experts"}]).token_ids == expected
    assert answer(model, torch.tensor([ids]))[0, len(ids) :].tolist() == expected
    assert [token.id for token in model.stream(torch.tensor(ids), max_new_tokens=12, **ENDLESS)] == expected
    assert answer(model, "the experts").stats.prompt_tokens == len(ids)


def test_raw_text_is_continued(model: moe_local.Model) -> None:
    ids = model.tokenizer("the experts")["input_ids"]
    assert answer(model, "the experts", template=False).token_ids == answer(model, ids).token_ids
    assert answer(model, tuple(ids)).token_ids == answer(model, ids).token_ids
    assert answer(model, ids).stats.prompt_tokens == len(ids)


def test_text_is_the_sum_of_its_pieces(model: moe_local.Model) -> None:
    stream = model.stream("hello", max_new_tokens=40, **ENDLESS)
    tokens = list(stream)
    out = answer(model, "hello", 40)
    assert "".join(token.text for token in tokens) == stream.text == out.text
    assert [token.id for token in tokens] == stream.token_ids == out.token_ids
    assert out.text == model.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    assert [token.finish_reason for token in tokens] == [None] * 39 + [FinishReason.LENGTH]
    assert out.finish_reason == stream.finish_reason == "length"
    with pytest.raises(StopIteration):
        next(stream)


def test_end_token_and_stop_strings(model: moe_local.Model) -> None:
    ids = answer(model, "hello", 20).token_ids
    out = model.generate("hello", max_new_tokens=20, eos_token_id=ids[6])
    assert out.finish_reason == "stop"
    assert out.token_ids == ids[: ids.index(ids[6]) + 1]
    pieces = [token.text for token in model.stream("hello", max_new_tokens=20, **ENDLESS)]
    stop = next(piece for piece in pieces[3:] if piece.isascii() and piece)
    for stops in (stop, ["no such text", stop]):
        out = answer(model, "hello", 20, stop=stops)
        assert out.finish_reason == "stop"
        assert out.text.endswith(stop)
        assert out.token_ids == ids[: len(out.token_ids)]
        assert len(out.token_ids) < 20
    assert answer(model, "hello", 20, stop=[]).token_ids == ids


def test_stop_strings_are_looked_for_in_the_answer_alone(model: moe_local.Model) -> None:
    """From its first token on; the text of the prompt does not count, nor where the two meet."""
    for prompt in range(3, 320):
        said = model.tokenizer.decode([prompt])
        first, second = (token.text for token in model.stream([prompt], max_new_tokens=2, **ENDLESS))
        if f"{said}{first}{second}".isascii() and said and first and second:
            break
    whole = answer(model, [prompt]).token_ids
    assert answer(model, [prompt], stop=[said[-1] + first]).token_ids == whole
    assert answer(model, [prompt], stop=[said[-1] + first, first]).token_ids == whole[:1]
    assert answer(model, [prompt], stop=first[-1] + second[0]).token_ids == whole[:2]


def test_an_answer_ends_with_the_context(model: moe_local.Model) -> None:
    out = model.generate("hello", **ENDLESS)  # 512 tokens are asked for, 256 hold prompt and answer
    assert out.finish_reason == "length"
    assert out.stats.prompt_tokens + len(out.token_ids) == 257  # the last one is never fed back
    assert len(answer(model, [5] * 256, 3).token_ids) == 1
    model.check_integrity()


def test_sampling_options(model: moe_local.Model) -> None:
    greedy = answer(model, "hello").token_ids
    assert answer(model, "hello", temperature=0).token_ids == greedy
    assert answer(model, "hello", temperature=5.0, top_k=1).token_ids == greedy
    sampled = answer(model, "hello", temperature=1.5, seed=3).token_ids
    assert sampled != greedy
    assert answer(model, "hello", temperature=1.5, seed=3).token_ids == sampled
    assert answer(model, "hello", temperature=1.5, seed=4).token_ids != sampled
    config = GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert model.generate("hello", generation_config=config).token_ids == greedy[:3]


BAD_CALLS: list[tuple[Any, dict[str, Any], str]] = [
    ("a", {"temprature": 1.0}, "unknown generation option 'temprature'; did you mean temperature"),
    ("a", {"temperature": -1}, "temperature is -1"),
    ("a", {"temperature": "hot"}, "temperature is 'hot'"),
    ("a", {"top_p": 2.0}, "top_p is 2.0"),
    ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ("a", {"max_new_tokens": "5"}, "max_new_tokens is '5'"),
    ("a", {"min_length": ["a"]}, "min_length is ['a']"),
    ("a", {"max_time": (1, 2)}, "max_time is (1, 2)"),
    ("a", {"exponential_decay_length_penalty": []}, "list index out of range"),
    ("\ud800", {"template": False}, "the prompt has half a character, at 0"),
    ([{"role": "user", "content": "a\ud800"}], {}, "message 0 has half a character, at 1"),
    ("a", {"seed": "x"}, "seed is 'x'"),
    ("a", {"seed": 2**70}, "seed is 1180591620717411303424"),
    ("a", {"stop": ""}, "stop string '' is not"),
    ("a", {"stop": [5]}, "stop string 5 is not"),
    ("a", {"num_beams": 3}, "num_beams cannot be used with text"),
    ("a", {"logits_processor": [lambda ids, scores: scores]}, "logits_processor cannot be used with text"),
    ("a", {"return_dict_in_generate": True}, "return_dict_in_generate cannot be used with text"),
    ("a", {"num_return_sequences": 2, "temperature": 1.0}, "num_return_sequences cannot be used with text"),
    ("a", {"attention_mask": torch.ones(1, 1)}, "attention_mask cannot be used with text"),
    ("a", {"tokenizer": None}, "tokenizer cannot be used with text"),
    ("", {"template": False}, "the prompt is empty"),
    ([], {}, "the prompt is empty"),
    (None, {}, "the prompt is None"),
    (b"abc", {}, "the prompt is b'abc'"),
    ({"role": "user", "content": "a"}, {}, "the prompt is {'role': 'user'"),
    ([1.5], {}, "item 0 of the prompt is 1.5"),
    ([True], {}, "item 0 of the prompt is True"),
    ([{"role": "user"}], {}, "message 0 has no content; give text"),
    ([1, 320], {}, "token id 320 in the prompt is outside the vocabulary, 0 to 319"),
    ([1, -1], {}, "token id -1 in the prompt is outside the vocabulary"),
    ([5] * 257, {}, "the prompt has 257 tokens, the context holds 256"),
    (torch.tensor([[1, 320]]), {}, "token id 320"),
    (torch.tensor([[1, 320]]), {"num_beams": 2}, "token id 320"),
    (torch.tensor([[1, 2]]), {"temprature": 1.0}, "unknown generation option 'temprature'"),
    (torch.tensor([[1, 2]]), {"seed": "x"}, "seed is 'x'"),
    (torch.tensor([1, 2]), {}, "shape [2]"),
    (torch.zeros((1, 0), dtype=torch.long), {}, "shape [1, 0]"),
    (torch.tensor([[1.0]]), {}, "float32"),
    (torch.full((1, 257), 5), {}, "the prompt has 257 tokens"),
    (torch.tensor([[1, 2]]), {"attention_mask": torch.ones(1, 3)}, "attention_mask has shape [1, 3]"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_are_one_line_and_cost_nothing(
    model: moe_local.Model, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        if isinstance(prompt, torch.Tensor):
            model.generate(prompt, **{"max_new_tokens": 2, **options})
        else:
            model.stream(prompt, **{"max_new_tokens": 2, **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(answer(model, "hello", 2).token_ids) == 2


# --- records


def test_an_answers_figures_are_the_sums_of_its_tokens(model: moe_local.Model) -> None:
    answer(model, "something else before")
    before = model.stats()
    stream = model.stream("the router sends each token", max_new_tokens=30, **ENDLESS)
    tokens = list(stream)
    stats, after = stream.stats, model.stats()
    assert stats.counts == after - before
    assert stats.new_tokens == len(tokens) == after.tokens - before.tokens == 30
    assert stats.hits == sum(token.hits for token in tokens) > 0
    assert stats.misses == sum(token.misses for token in tokens) > 0
    assert stats.stall_s == pytest.approx(sum(token.stall_ms for token in tokens) / 1000)
    assert stats.stall_s > 0
    assert stats.counts.bytes.disk == sum(token.bytes_disk for token in tokens) > 0
    assert stats.counts.bytes.h2d == sum(token.bytes_h2d for token in tokens) == 0
    assert stats.ttft_s + stats.decode_s == pytest.approx(sum(token.ms for token in tokens) / 1000)
    assert stats.tokens_per_s == pytest.approx(29 / stats.decode_s)
    prefetch = stats.counts.prefetch
    assert prefetch.issued >= prefetch.used + prefetch.late > 0


def test_stats_count_generated_tokens_of_every_kind(model: moe_local.Model) -> None:
    before = model.stats().tokens
    answer(model, "hello", 3)
    answer(model, torch.tensor([[0, 5, 6], [7, 8, 9]]), 4)
    answer(model, torch.tensor([[7, 8, 9]]), 5, num_beams=2)
    assert model.stats().tokens - before == 3 + 2 * 4 + 5


def test_records_are_frozen_and_plain_json(model: moe_local.Model) -> None:
    stream = model.stream("hello", max_new_tokens=3, **ENDLESS)
    token = next(stream)
    out = stream.output()
    for record in (token, out, out.stats, out.stats.counts, model.stats()):
        name = dataclasses.fields(record)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, 1)
    for fields in (out.to_dict(), model.stats().to_dict(), model.plan.to_dict()):
        assert json.loads(json.dumps(fields)) == fields
    fields = out.to_dict()
    assert fields["finish_reason"] == "length"
    assert {"text", "token_ids", "finish_reason", "stats"} <= fields.keys()
    assert {"ttft_s", "tokens_per_s", "hits", "misses", "stall_s", "prefetch"} <= fields["stats"].keys()
    assert fields["stats"]["prefetch"].keys() >= {"issued", "used", "late", "wasted_bytes", "state"}


# --- turns


def test_a_stream_given_up_leaves_the_model_usable(model: moe_local.Model) -> None:
    expected = answer(model, "hello").token_ids
    stream = model.stream("the token", max_new_tokens=20, **ENDLESS)
    first = [next(stream).id, next(stream).id]
    stream.close()
    stream.close()
    assert stream.token_ids == first
    assert stream.stats.new_tokens == 2
    assert list(stream) == []
    assert answer(model, "hello").token_ids == expected
    with model.stream("the token", max_new_tokens=20, **ENDLESS) as stream:
        next(stream)
    assert answer(model, "hello").token_ids == expected
    stream = model.stream("the token", max_new_tokens=20, **ENDLESS)
    next(stream)
    del stream
    assert answer(model, "hello").token_ids == expected
    model.stream("never begun")
    assert answer(model, "hello").token_ids == expected


def test_one_answer_at_a_time_in_a_thread(model: moe_local.Model) -> None:
    expected = answer(model, "the token", 5).token_ids
    stream = model.stream("the token", max_new_tokens=5, **ENDLESS)
    ids = [next(stream).id]
    for other in (lambda: next(model.stream("b")), lambda: answer(model, torch.tensor([[1]]))):
        with pytest.raises(MoeLocalError, match="in the middle of another answer; finish its stream or clos"):
            other()
    model.hf(torch.tensor([[5, 6, 7]]))  # a plain call between two tokens changes nothing
    assert ids + [token.id for token in stream] == expected


def test_threads_take_turns(model: moe_local.Model) -> None:
    prompts = ["hello", "the token", "experts of the text", "a"]
    expected = [answer(model, prompt).token_ids for prompt in prompts]
    found: dict[int, list[list[int]]] = {}

    def ask(index: int) -> None:
        rounds = (prompts[index] for _ in range(3))
        found[index] = [answer(model, prompt).token_ids for prompt in rounds]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [expected[index]] * 3 for index in range(4)}


def test_a_stream_may_move_from_thread_to_thread(model: moe_local.Model) -> None:
    """As an HTTP server's thread pool moves it; the thread where it began is free for others, who wait."""
    expected = answer(model, "the token", 5).token_ids
    other = answer(model, "hello", 3).token_ids
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        stream = model.stream("the token", max_new_tokens=5, **ENDLESS)
        ids = [first.submit(next, stream).result().id, second.submit(next, stream).result().id]
        waiting = first.submit(lambda: answer(model, "hello", 3).token_ids)
        ids += [second.submit(next, stream).result().id for _ in range(3)]
        assert waiting.result() == other
    assert ids == expected


def test_a_stream_may_be_closed_while_another_thread_makes_its_token(model: moe_local.Model) -> None:
    """As by a button that stops an answer: the reader's stream just ends, where a whole step has."""
    expected = answer(model, "hello").token_ids
    engine = model.parts.engine
    stream = model.stream("the token", max_new_tokens=200, **ENDLESS)
    inside, go_on, step = threading.Event(), threading.Event(), engine.step

    def slowly() -> Any:
        inside.set()
        assert go_on.wait(20)
        return step()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(engine, "step", slowly)
        reading = pool.submit(list, stream)
        assert inside.wait(20)
        with pytest.raises(MoeLocalError, match="another thread is waiting for the next token"):
            next(stream)
        closing = pool.submit(stream.close)
        assert not closing.done()
        go_on.set()
        closing.result(20)
        assert len(reading.result(20)) == len(stream.token_ids) < 200
    model.check_integrity()
    assert answer(model, "hello").token_ids == expected


def test_a_stream_that_waits_for_its_turn_may_be_closed(model: moe_local.Model) -> None:
    first, second = (model.stream(prompt, max_new_tokens=9, **ENDLESS) for prompt in ("hello", "the token"))
    next(first)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, second)
        time.sleep(0.01)
        second.close()
        assert waiting.result(20) == []
    assert len(list(first)) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forks_copy_says_what_it_is(model: moe_local.Model) -> None:
    """It would wait for threads that it has not; and its end takes nothing from the model."""
    stream = model.stream("the token", max_new_tokens=5, **ENDLESS)
    expected = [next(stream).id]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for ask in (
            lambda: next(stream),
            lambda: answer(model, "b"),
            lambda: answer(model, torch.tensor([[1]])),
        ):
            try:
                ask()
            except MoeLocalError as error:
                said.append(str(error))
        model.close()
        os.write(write, "\n".join(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read().splitlines()
    os.waitpid(child, 0)
    assert len(said) == 3
    assert set(said) == {
        f"the model was loaded in process {os.getpid()}, and a fork has no threads to run it; "
        f"load() it in process {child}, too"
    }
    expected += [token.id for token in stream]
    assert answer(model, "the token", 5).token_ids == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forks_copy_waits_for_no_token_of_a_thread_that_it_has_not(model: moe_local.Model) -> None:
    engine = model.parts.engine
    inside, go_on, step = threading.Event(), threading.Event(), engine.step

    def slowly() -> Any:
        inside.set()
        assert go_on.wait(60)
        return step()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(engine, "step", slowly)
        stream = model.stream("the token", max_new_tokens=5, **ENDLESS)
        reading = pool.submit(list, stream)
        assert inside.wait(20)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            try:
                next(stream)
            except MoeLocalError as error:
                stream.close()
                os._exit(7 if "a fork has no threads" in str(error) else 1)
            os._exit(2)
        _, status = os.waitpid(child, 0)
        go_on.set()
        assert len(reading.result(20)) == 5
    assert os.waitstatus_to_exitcode(status) == 7


def test_figures_can_be_looked_at_while_a_stream_is_closed(model: moe_local.Model) -> None:
    stream = model.stream("the token", max_new_tokens=5, **ENDLESS)
    next(stream)
    engine, leave, seen = model.parts.engine, model.parts.engine.leave, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "leave", lambda sequence: (seen.append(stream.stats), leave(sequence)))
        stream.close()
    assert seen == [stream.stats]
    assert stream.stats.counts.hits + stream.stats.counts.misses > 0


def test_a_model_is_not_copied(model: moe_local.Model) -> None:
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(MoeLocalError, match="cannot be copied or pickled; load"):
            copied(model)


def test_numbers_and_ids_as_other_libraries_give_them(model: moe_local.Model) -> None:
    expected = answer(model, "the token", 5).token_ids
    assert answer(model, "the token", numpy.int64(5)).token_ids == expected
    sampled = [
        model.generate("the token", max_new_tokens=5, temperature=temperature, seed=seed).token_ids
        for temperature, seed in ((0.5, 3), (numpy.float32(0.5), numpy.int32(3)))
    ]
    assert sampled[0] == sampled[1]
    inputs = model.tokenizer(["the token"], return_tensors="pt")
    ids = inputs["input_ids"]
    plain = model.generate(ids, max_new_tokens=3)
    assert torch.equal(
        model.generate(input_ids=ids, attention_mask=inputs["attention_mask"], max_new_tokens=numpy.int8(3)),
        plain,
    )


def test_a_tokenizers_result_is_a_batch(model: moe_local.Model) -> None:
    """Padded where no answer begins, though most tokenizers are published to pad at the right."""
    texts, limits = ["the router", "the experts of a layer, and"], {"max_new_tokens": 5, "eos_token_id": None}
    given = model.tokenizer(texts, return_tensors="pt", padding=True)
    assert 0 in given["attention_mask"][0]
    found = model.generate(**given, **limits)
    for text, row in zip(texts, found, strict=True):
        alone = model.generate(text, template=False, **limits)
        assert row[-5:].tolist() == alone.token_ids


def test_a_conversation_computes_only_what_is_new(model: moe_local.Model) -> None:
    messages = [{"role": "user", "content": "the experts of the text"}]
    for turn in range(3):
        out = answer(model, messages, 6)
        computed = out.stats.counts.routed.tokens[0]
        if turn:
            assert computed < out.stats.prompt_tokens
        # without what another prompt left behind
        prompt = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer(model, [7, 7, 7], 1)
        fresh = answer(model, prompt, 6)
        assert fresh.token_ids == out.token_ids
        assert fresh.stats.counts.routed.tokens[0] == len(prompt) + 5
        answer(model, messages, 6)
        reply = out.text.replace("\ufffd", "")
        messages += [
            {"role": "assistant", "content": reply},
            {"role": "user", "content": f"and the router {turn}"},
        ]


# --- Ctrl-C


def interrupt_after(seconds: float, call: Callable[[], object]) -> bool:
    """Press Ctrl-C `seconds` into the call; whether it was felt there."""

    def press() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    felt = False
    try:
        try:
            thread.start()
            call()
        except KeyboardInterrupt:
            felt = True
        thread.join()
        time.sleep(0.0001)
    except KeyboardInterrupt:
        pass
    return felt


def check_interrupts(model: moe_local.Model, presses: int, seed: int) -> None:
    """Ctrl-C at random moments of every kind of call; then nothing is amiss and answers are right."""
    chance = random.Random(seed)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = answer(model, "hello", 6).token_ids
    expected_ids = answer(model, ids, 6)
    calls: list[Callable[[], object]] = [
        lambda: answer(model, "hello", 6),
        lambda: answer(model, ids, 6),
        lambda: model.hf(ids),
        lambda: list(model.stream("the token", max_new_tokens=6, **ENDLESS)),
        lambda: answer(model, ids, 4, num_beams=2),
    ]
    felt = number = 0
    while number < presses or felt <= presses // 4:  # a call may end before its moment has come
        number += 1
        call = chance.choice(calls)
        start = time.perf_counter()
        call()
        duration = time.perf_counter() - start
        felt += interrupt_after(chance.uniform(0, duration), call)
        model.check_integrity()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if chance.random() < 0.3:
            assert answer(model, "hello", 6).token_ids == expected
    assert answer(model, "hello", 6).token_ids == expected
    assert torch.equal(answer(model, ids, 6), expected_ids)


@pytest.fixture
def slow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads from disk that take a while, so that waits and loads are under way at most moments."""
    read = transfer._read

    def slowly(*args: Any) -> Any:
        time.sleep(0.002)
        return read(*args)

    monkeypatch.setattr(transfer, "_read", slowly)


@pytest.fixture
def _python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("slow_reads", "_python_handler")
def test_ctrl_c_leaves_the_model_usable(model: moe_local.Model) -> None:
    check_interrupts(model, presses=24, seed=1)


@pytest.mark.slow
@pytest.mark.usefixtures("_python_handler")
@pytest.mark.parametrize("slow", [True, False])
def test_ctrl_c_at_many_moments(model: moe_local.Model, request: pytest.FixtureRequest, slow: bool) -> None:
    if slow:
        request.getfixturevalue("slow_reads")
    check_interrupts(model, presses=600, seed=2)


@pytest.mark.usefixtures("_python_handler")
def test_ctrl_c_while_waiting_for_a_turn(model: moe_local.Model) -> None:
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        stream = model.stream("hello", max_new_tokens=3, **ENDLESS)
        next(stream)
        begun.set()
        done.wait()
        stream.close()

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    assert interrupt_after(0.05, lambda: answer(model, "hello"))
    done.set()
    thread.join()
    assert len(answer(model, "hello", 2).token_ids) == 2


# --- close


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moe-local")]


def open_expert_files() -> list[str]:
    return [file.path for file in psutil.Process().open_files() if "layer-" in file.path]


def test_close_frees_everything(make_checkpoint: Callable[..., Path]) -> None:
    """Even if the model, its streams and its outputs are kept. 100 MiB of experts, 17 of dense part."""
    folder = make_checkpoint(
        "mixtral", dtype=torch.bfloat16, hidden_size=512, intermediate_size=1024, num_hidden_layers=4
    )
    process = psutil.Process()
    threads, files = reader_threads(), open_expert_files()
    moe_local.load(folder, experts="bf16", context=64).close()  # what libraries keep, they keep from here on
    for attempt in range(3):  # the system may take pages back that others in this process had, at any time
        gc.collect()
        start = process.memory_info().rss
        model = moe_local.load(folder, experts="bf16", context=4096)
        stream = model.stream([5, 6, 7], max_new_tokens=4, **ENDLESS)
        unbegun = model.stream([5, 6, 7])
        out = stream.output()
        held = process.memory_info().rss - start
        assert len(reader_threads()) > len(threads)
        assert len(open_expert_files()) > len(files)
        embeddings = weakref.ref(model.hf.get_input_embeddings().weight)
        hf = model.hf
        model.close()
        model.close()
        with pytest.raises(MoeLocalError, match="is closed; load\\(\\) it again"):
            hf(torch.tensor([[1, 2]]))  # not silently without its experts
        del hf
        gc.collect()
        assert embeddings() is None
        kept = process.memory_info().rss - start
        if held > 90 * 2**20 and kept < held // 8:
            break
        assert attempt < 2, (held, kept)
    assert reader_threads() == threads
    assert open_expert_files() == files
    assert out.token_ids == stream.token_ids
    for use in (
        lambda: model.generate([1]),
        lambda: model.stream([1]),
        lambda: model.generate(torch.tensor([[1]])),
        lambda: next(unbegun),
        lambda: model.stats(),
        lambda: model.hf,
        lambda: model.check_integrity(),
        lambda: model.__enter__(),
    ):
        with pytest.raises(MoeLocalError, match="is closed; load\\(\\) it again"):
            use()
    assert "closed" in repr(model)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: unspecified launch failure\nmore"), KeyError("x")]
)
def test_close_frees_everything_where_the_counts_are_lost(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """A device that is gone has some of them, and closing frees; what else fails is told after it."""
    threads, files = reader_threads(), open_expert_files()
    model = moe_local.load(tiny_mixtral, slots=2, context=64, **EXACT)
    assert answer(model, "hello", 2).token_ids
    routed, hf = model.parts.store.routed, model.hf

    def fails(self: object) -> None:
        raise error

    monkeypatch.setattr(type(routed), "snapshot", fails)
    expected = pytest.raises(KeyError) if isinstance(error, KeyError) else contextlib.nullcontext()
    with expected:
        model.close()
    model.close()
    assert reader_threads() == threads
    assert open_expert_files() == files
    with pytest.raises(MoeLocalError, match="is closed; load\\(\\) it again"):
        hf(torch.tensor([[1, 2]]))
    lines = [record.getMessage() for record in caplog.records]
    kept = "in this run is not kept: CUDA error: unspecified launch failure"
    assert any(line.endswith(kept) for line in lines) == isinstance(error, RuntimeError)


def test_close_in_the_middle_of_an_answer(tiny_mixtral: Path) -> None:
    with moe_local.load(tiny_mixtral, slots=2, context=64, **EXACT) as model:
        done = model.stream("hello", max_new_tokens=2, **ENDLESS)
        done.output()
        stream = model.stream("hello", max_new_tokens=5, **ENDLESS)
        next(stream)
    with pytest.raises(MoeLocalError, match="is closed; load"):
        next(stream)  # not an end like any other: the answer is cut off
    assert stream.stats.new_tokens == len(stream.token_ids) == 1
    assert stream.finish_reason is None
    assert list(done) == []
    assert done.stats.counts.tokens == 2


def test_close_lets_an_answer_in_another_thread_finish(tiny_mixtral: Path) -> None:
    """Whoever waits behind it gets the answer, if close is later in the queue, or one clear line."""
    model = moe_local.load(tiny_mixtral, slots=2, context=64, **EXACT)
    expected = answer(model, "hello", 20).token_ids
    begun, go = threading.Event(), threading.Event()
    answers: list[list[int]] = []
    errors: list[Exception] = []

    def run() -> None:
        stream = model.stream("hello", max_new_tokens=20, **ENDLESS)
        next(stream)
        begun.set()
        go.wait()
        answers.append(stream.output().token_ids)

    def wait_behind() -> None:
        try:
            answers.append(answer(model, "hello", 20).token_ids)
        except Exception as error:
            errors.append(error)

    def close() -> None:
        try:
            model.close()
        except Exception as error:
            errors.append(error)

    first = threading.Thread(target=run)
    first.start()
    begun.wait()
    others = [threading.Thread(target=target) for target in (close, wait_behind, close, wait_behind)]
    for thread in others:
        thread.start()
    go.set()
    for thread in (first, *others):
        thread.join()
    assert len(answers) + len(errors) == 3
    assert answers == [expected] * len(answers)
    assert all(isinstance(e, MoeLocalError) and "is closed" in str(e) for e in errors)


@pytest.mark.slow
def test_exit_with_an_open_stream_is_silent(tiny_mixtral: Path) -> None:
    """Nor does an answer under way in a thread keep the process from ending."""
    script = (
        "import moe_local, threading\n"
        f"model = moe_local.load({str(tiny_mixtral)!r}, slots=2, context=256)\n"
        "stream = model.stream('hello', max_new_tokens=200)\n"
        "print(next(stream).id >= 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
