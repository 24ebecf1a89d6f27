"""Log probabilities over HTTP: the model's own, each once, with the text they are of."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest
import torch

import moe_local
from moe_local.cli.server.logprobs import LEAST, Echo, Entry, TokenNames
from moe_local.offload.engine.text import encode_prompt
from moe_local.offload.engine.token_bytes import TokenBytes

QUESTION: list[Any] = [{"role": "user", "content": "What is a router?"}]
TOLERANCE = 1e-3
"""How far sums in another order may be apart, as of rows that are computed beside others."""


def check(entries: Any, output: Any, known: TokenBytes, count: int) -> None:
    """What a client reads against what Python says of the same answer."""
    assert len(entries) == len(output.token_ids)
    for entry, token, want in zip(entries, output.token_ids, output.logprobs, strict=True):
        assert bytes(entry.bytes) == known.of(token)
        assert entry.token == known.of(token).decode(errors="replace")
        assert entry.logprob == pytest.approx(want.logprob, abs=TOLERANCE)
        assert len(entry.top_logprobs) == count
        for other, (top, value) in zip(entry.top_logprobs, want.top_logprobs, strict=True):
            assert bytes(other.bytes) == known.of(top)
            assert other.token == known.of(top).decode(errors="replace")
            assert other.logprob == pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize("count", [0, 3])
def test_of_a_chat_whole_and_streamed(client: openai.OpenAI, model: moe_local.Model, count: int) -> None:
    known = TokenBytes(model.tokenizer)
    output = model.generate(QUESTION, max_new_tokens=20, do_sample=False, logprobs=count)
    asked: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 20, "temperature": 0, "logprobs": True}
    answer = client.chat.completions.create(**asked, top_logprobs=count, n=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * len(output.token_ids)
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.refusal is None
        check(choice.logprobs.content, output, known, count)
        joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content or [])
        assert joined.decode().startswith(choice.message.content or "")
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**asked, top_logprobs=count, stream=True):
        (part,) = chunk.choices
        assert part.logprobs is not None
        streamed += part.logprobs.content or []
    check(streamed, output, known, count)
    plain = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=2)
    assert plain.choices[0].logprobs is None


def test_sampling_does_not_change_what_the_model_thinks(
    client: openai.OpenAI, model: moe_local.Model
) -> None:
    """The first place of an answer is the same however its token is picked."""
    (token,) = model.stream(QUESTION, max_new_tokens=1, logprobs=5)
    for sampling in ({"temperature": 3.0}, {"temperature": 0.2, "top_p": 0.1}):
        answer = client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=1, logprobs=True, top_logprobs=5, seed=1, **sampling
        )
        assert answer.choices[0].logprobs is not None
        (entry,) = answer.choices[0].logprobs.content or []
        got = [other.logprob for other in entry.top_logprobs]
        assert got == pytest.approx([value for _, value in token.top_logprobs or ()], abs=TOLERANCE)


@pytest.mark.parametrize("count", [0, 2])
def test_of_a_completion(client: openai.OpenAI, model: moe_local.Model, count: int) -> None:
    known = TokenBytes(model.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "template": False}
    output = model.generate("The router", logprobs=count, **options)
    asked: Any = {"model": "demo", "prompt": "The router", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=count).choices[0]
    names = [known.of(token).decode(errors="replace") for token in output.token_ids]
    scores = whole.logprobs
    assert scores is not None
    assert scores.tokens == names
    assert scores.token_logprobs == pytest.approx([s.logprob for s in output.logprobs or []], abs=TOLERANCE)
    assert scores.text_offset is not None
    assert scores.text_offset[0] == 0
    assert all(
        whole.text.startswith(name, at) for name, at in zip(names[:-1], scores.text_offset, strict=False)
    )
    assert scores.top_logprobs is not None
    for name, logprob, top in zip(names, scores.token_logprobs or [], scores.top_logprobs, strict=True):
        assert top[name] == logprob == max(top.values())  # the greedy one is in it, and the best
        assert len(top) <= max(count, 1)
    parts = [
        chunk.choices[0].logprobs for chunk in client.completions.create(**asked, logprobs=count, stream=True)
    ]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [item for part in parts for item in getattr(part, field)]
        if field in ("tokens", "text_offset"):
            assert streamed == getattr(scores, field)
        else:
            assert len(streamed) == len(names)
    plain = client.completions.create(**asked).choices[0]
    assert plain.logprobs is None


PROMPTS = ["The router sends each token to two experts.", "An expert: 😀"]


def check_prompt(scores: Any, text: str, ids: list[int], model: moe_local.Model, count: int) -> None:
    """The first `len(ids)` places of a completion against a plain forward of the model."""
    known = TokenBytes(model.tokenizer)
    with torch.inference_mode():
        logits = model.hf(input_ids=torch.tensor([ids])).logits[0]
    want = torch.log_softmax(logits.float(), dim=-1)
    names = [known.of(token).decode(errors="replace") for token in ids]
    assert scores.tokens[: len(ids)] == names
    assert scores.token_logprobs[0] is scores.top_logprobs[0] is None
    special = set(model.tokenizer.all_special_ids)
    for place in range(1, len(ids)):
        logprob = float(want[place - 1, ids[place]])
        assert scores.token_logprobs[place] == pytest.approx(logprob, abs=TOLERANCE)
        top = scores.top_logprobs[place]
        best = want[place - 1].topk(max(count, 1)).values.tolist()
        assert max(top.values()) == pytest.approx(best[0] if count else logprob, abs=TOLERANCE)
        if ids[place] not in special and "\ufffd" not in names[place]:
            assert scores.token_logprobs[place] == top[names[place]]
            assert text.startswith(names[place], scores.text_offset[place])


@pytest.mark.parametrize("count", [0, 2])
def test_of_an_echoed_prompt(client: openai.OpenAI, model: moe_local.Model, count: int) -> None:
    """As evaluations ask how likely texts are: prompts of ids, with no new token or one that they drop."""
    prompts = [model.tokenizer(text)["input_ids"] for text in PROMPTS]
    asked: Any = {"model": "demo", "prompt": prompts, "echo": True, "logprobs": count, "temperature": 0}
    silent = client.completions.create(**asked, max_tokens=0)
    assert silent.usage is not None
    assert silent.usage.completion_tokens == 0
    assert silent.usage.prompt_tokens == sum(map(len, prompts))
    one = client.completions.create(**asked, max_tokens=1)
    for answer, new in ((silent, 0), (one, 1)):
        for choice, ids, text in zip(answer.choices, prompts, PROMPTS, strict=True):
            assert choice.finish_reason == "length" or new
            assert choice.text.startswith(text)
            assert new or choice.text == text
            scores = choice.logprobs
            assert scores is not None
            for field in (scores.tokens, scores.token_logprobs, scores.top_logprobs, scores.text_offset):
                assert field is not None
                assert len(field) == len(ids) + new
            check_prompt(scores, choice.text, ids, model, count)
    assert [c.logprobs.text_offset[-1] for c in one.choices] == [len(t) for t in PROMPTS]  # type: ignore[union-attr,index]


def test_of_an_echoed_prompt_as_a_stream(client: openai.OpenAI, model: moe_local.Model) -> None:
    """The text is there before its log probabilities are, which come with the next chunk."""
    ids = model.tokenizer("The router")["input_ids"]
    for new in (0, 4):
        asked: Any = {"model": "demo", "prompt": "The router", "echo": True, "logprobs": 1, "temperature": 0}
        whole = client.completions.create(**asked, max_tokens=new).choices[0]
        chunks = [c.choices[0] for c in client.completions.create(**asked, max_tokens=new, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert chunks[0].text == "The router"
        assert whole.logprobs is not None
        for field in ("tokens", "text_offset"):
            joined = [item for chunk in chunks for item in getattr(chunk.logprobs, field)]
            assert joined == getattr(whole.logprobs, field)
            assert len(joined) == len(ids) + new


def test_an_echo_alone(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="The router", echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("The router", None)
    with pytest.raises(openai.BadRequestError, match=r"max_tokens is 0; it must be .* or come with an echo"):
        client.completions.create(model="demo", prompt="The router", max_tokens=0)


def scored(server: Any, path: str, body: dict[str, Any]) -> tuple[list[float], list[tuple[str, list[float]]]]:
    """The log probabilities of a whole answer, and of each chunk of a streamed one with its text."""

    def of(choice: dict[str, Any]) -> list[float]:
        found = choice["logprobs"]
        return found["token_logprobs"] if path == "completions" else [e["logprob"] for e in found["content"]]

    whole = server.http.post(f"{server.url}/v1/{path}", json=body).json()["choices"][0]
    lines = server.http.post(f"{server.url}/v1/{path}", json={**body, "stream": True}).text.splitlines()
    chunks = []
    for line in lines:
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            text = choice.get("text", "") or "".join(str(v) for v in choice.get("delta", {}).values())
            chunks.append((text, of(choice)))
    return of(whole), chunks


def numbers(count: int) -> list[float]:
    return [-float(number) for number in range(count)]


def test_of_text_that_is_held_back(serving: Any, scripted: Any) -> None:
    """Each goes with the first chunk that shows something of its token, or behind it; none beyond a stop."""
    # in pieces of two: "on" "e " "tw" "o " "ST" "OP" " t" "hr"
    with serving(scripted("one two STOP three", size=2)) as server:
        body = {"prompt": "x", "logprobs": 0, "stop": ["STOP"]}
        whole, chunks = scored(server, "completions", body)
        assert whole == numbers(4)
        assert chunks == [("on", [0]), ("e ", [-1]), ("tw", [-2]), ("o ", [-3]), ("", [])]
        # "e" may be the stop's beginning, and is not; "o S" is, so of "ST" nothing is shown
        whole, chunks = scored(server, "completions", {**body, "stop": ["e  ", "o ST"]})
        assert whole == numbers(3)
        assert chunks == [("on", [0]), ("e tw", [-1, -2]), ("", [])]
        # half of "ST" is shown
        whole, chunks = scored(server, "completions", {**body, "stop": ["TO"]})
        assert whole == numbers(5)
        assert chunks[-2:] == [("S", [-4]), ("", [])]
        # no stop after all
        whole, chunks = scored(server, "completions", {**body, "stop": ["three!"]})
        assert whole == numbers(9)
        assert chunks[-3:] == [(" ", [-6]), ("three", [-7, -8]), ("", [])]


def test_of_thoughts_and_their_marks(serving: Any, scripted: Any) -> None:
    """Marks that no client sees are tokens all the same, and go with what follows."""
    with serving(scripted("<think>ab</think>\n\ncd", size=1)) as server:
        body = {"messages": QUESTION, "logprobs": True}
        whole, chunks = scored(server, "chat/completions", body)
        assert whole == numbers(21)
        assert [number for _, part in chunks for number in part] == numbers(21)
        shown = [(text, len(part)) for text, part in chunks if text]
        assert shown == [("assistant", 0), ("a", 8), ("b", 1), ("c", 11), ("d", 1)]


def test_what_no_text_has_goes_with_the_end(serving: Any, scripted: Any) -> None:
    with serving(scripted("ab", size=1, silent=2)) as server:
        whole, chunks = scored(server, "completions", {"prompt": "x", "logprobs": 0})
        assert whole == numbers(4)
        assert chunks == [("a", [0]), ("b", [-1]), ("", [-2, -3])]


def test_numbers_that_json_cannot_say(model: moe_local.Model) -> None:
    names = TokenNames(model.tokenizer)
    entry = Entry(40, -math.inf, ((41, -0.5), (42, -math.inf)), 0)
    (written,) = names.chat([entry])["content"]
    assert written["logprob"] == LEAST
    assert [top["logprob"] for top in written["top_logprobs"]] == [-0.5, LEAST]
    assert json.dumps(names.completion([entry]), allow_nan=False)


def test_half_characters(model: moe_local.Model) -> None:
    """Tokens that read alike are told apart by their bytes; where texts are keys, the likelier one stays."""
    names, known = TokenNames(model.tokenizer), TokenBytes(model.tokenizer)
    halves = encode_prompt(model.tokenizer, "😀", template=False)
    halves = [token for token in halves if "\ufffd" in known.of(token).decode(errors="replace")]
    assert len(halves) > 1
    entry = Entry(halves[1], -2.0, ((halves[0], -1.0), (halves[1], -2.0)), 0)
    (written,) = names.chat([entry])["content"]
    assert bytes(written["bytes"]) == known.of(halves[1])
    assert [bytes(top["bytes"]) for top in written["top_logprobs"]] == [known.of(half) for half in halves[:2]]
    assert names.completion([entry])["top_logprobs"] == [{"\ufffd": -1.0}]


def test_without_a_tokenizer() -> None:
    assert Echo.of(None, [5, 6]) == Echo([5, 6], "", [0, 0])
    names = TokenNames(None)
    entry = Entry(7, -1.0, ((3, -0.5),), 0)
    assert names.chat([entry])["content"][0]["bytes"] is None
    assert names.completion([entry]) == {
        "tokens": ["token_id:7"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"token_id:3": -0.5, "token_id:7": -1.0}],
        "text_offset": [0],
    }
