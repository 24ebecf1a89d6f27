"""Answers as messages that go on a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.answer_format.choose import answer_format
from moe_local.offload.engine.text import encode_prompt
from moe_local.offload.message import MessageReader
from support.chat_templates import DIALECTS, HYBRID, THINKING, tokenizer_of

QUESTION = {"role": "user", "content": "Will it rain?"}
CITY = {"type": "object", "properties": {"city": {"enum": ["Graz"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}
]


@pytest.fixture
def model(make_checkpoint: Callable[..., Path]) -> Iterator[moe_local.Model]:
    with moe_local.load(str(make_checkpoint("mixtral", tokenizer=True)), device="cpu") as loaded:
        yield loaded


@pytest.mark.parametrize("name", ["hermes", "qwen", "mistral", "harmony"])
def test_a_call_goes_into_the_conversation_and_its_result_behind_it(
    model: moe_local.Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(model, "tokenizer", tokenizer_of(DIALECTS[name]))
    grammar = model.answers.grammar({"weather": CITY})
    output = model.generate([QUESTION], tools=TOOLS, grammar=grammar, max_new_tokens=400, eos_token_id=2)
    assert output.message is not None
    assert output.to_dict()["message"] == output.message
    (call,) = output.message["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Graz"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "It will."}
    prompt = model.stream([QUESTION, output.message, result], tools=TOOLS).prompt_ids
    shown = model.tokenizer.decode(prompt)
    assert shown.index("rain?") < shown.index("Graz") < shown.index("It will.")


@pytest.mark.parametrize("limit", [{"stop": "arguments"}, {"max_new_tokens": 12}], ids=["stop", "length"])
def test_a_call_that_is_cut_off_is_left_out(
    model: moe_local.Model, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any]
) -> None:
    monkeypatch.setattr(model, "tokenizer", tokenizer_of(DIALECTS["hermes"]))
    grammar = model.answers.grammar({"weather": CITY})
    options = {"tools": TOOLS, "grammar": grammar, "max_new_tokens": 400, "eos_token_id": 2, **limit}
    output = model.generate([QUESTION], **options)
    assert output.text.startswith("<tool_call>")
    assert output.message == {"role": "assistant", "content": ""}


def test_a_thought_is_not_in_the_content() -> None:
    tokenizer = tokenizer_of(THINKING)
    answers = answer_format(tokenizer)
    prompt = encode_prompt(tokenizer, [QUESTION])
    ids = tokenizer("clouds, so</think>\n\nYes.", add_special_tokens=False)["input_ids"]
    said = MessageReader(answers, prompt, None, plain=False).read(ids, cut=False)
    assert said == {"role": "assistant", "content": "Yes.", "reasoning_content": "clouds, so"}
    plain = MessageReader(answers, prompt, None, plain=True).read(ids, cut=False)
    assert plain == {"role": "assistant", "content": "clouds, so</think>\n\nYes."}
    quiet = encode_prompt(tokenizer, [QUESTION], variables=answers.thinking(False))
    assert quiet == prompt[: len(quiet)]
    assert len(quiet) < len(prompt)


def test_json_behind_a_thought_is_the_content_of_the_message_and_the_end_of_the_text(
    model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "tokenizer", tokenizer_of(HYBRID))
    begin, end = (model.answers.tokens.ids[mark] for mark in ("<think>", "</think>"))
    drawn = {"temperature": 1.0, "seed": 2, "max_new_tokens": 300}
    options = {"logit_bias": {begin: 100, end: 4}, "json_schema": CITY, **drawn}
    output = model.generate([QUESTION], eos_token_id=2, **options)
    assert output.message is not None
    assert json.loads(output.message["content"]) == {"city": "Graz"}
    assert output.message["reasoning_content"]
    assert output.text.startswith("<think>")
    assert output.text.endswith(output.message["content"])
    quiet = model.generate(
        [QUESTION], eos_token_id=2, chat_template_kwargs={"enable_thinking": False}, **options
    )
    assert json.loads(quiet.text) == {"city": "Graz"}
    ids = model.stream([QUESTION]).prompt_ids
    rows = model.generate(torch.tensor([ids]), eos_token_id=2, **options)
    assert rows[0, len(ids)] == begin, "as ids, too"


def test_without_a_tokenizer_there_is_no_message(
    model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "tokenizer", None)
    output = model.generate([1, 2, 3], max_new_tokens=2)
    assert output.message is None
    assert "message" not in output.to_dict()


def test_a_template_that_is_changed_is_another_format(model: moe_local.Model) -> None:
    before = model.answers
    assert model.answers is before
    model.tokenizer.chat_template = DIALECTS["mistral"].template
    assert type(model.answers) is not type(before)
