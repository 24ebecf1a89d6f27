"""Calls of Llama 4, which have no marks around them, in both styles that its templates ask for."""

from __future__ import annotations

import itertools
import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.choose import answer_format
from moe_local.offload.answer_format.ends import complete_ends
from moe_local.offload.answer_format.llama_format import LlamaFormat
from moe_local.offload.engine.grammar import matcher
from moe_local.offload.engine.text import encode_prompt
from moe_local.offload.forms import lark_grammar
from support import tiny_models
from support.chat_templates import LLAMAS, tokenizer_of

PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}}
WEATHER = {"type": "object", "properties": PROPERTIES, "required": ["city"], "additionalProperties": False}
FUNCTIONS = {"weather": WEATHER, "now": None}
QUESTION = {"role": "user", "content": "Will it rain?"}
GRAZ = ("weather", {"city": 'Graz [1] "}', "days": 3})
JSON = '{"name": "weather", "parameters": {"city": "Graz [1] \\"}", "days": 3}}'
PYTHON = "[weather(city='Graz [1] \"}', days=3)]"
Read = tuple[str, list[tuple[str, Any]]]


@cache
def known(name: str) -> AnswerFormat:
    return answer_format(tokenizer_of(LLAMAS[name]))


def read(parts: list[str], functions: Any = FUNCTIONS, *, cut: bool = False, **options: Any) -> Read:
    """The content, and the calls."""
    parser = known("llama json").parser([], functions=functions, **options)
    pieces = [piece for part in parts for piece in parser.add(part)] + [*parser.flush(cut=cut)]
    calls = [(piece.call["name"], json.loads(piece.call["arguments"])) for piece in pieces if piece.call]
    return "".join(piece.content for piece in pieces), calls


ANSWERS: dict[str, tuple[str, Read]] = {
    "JSON": (JSON, ("", [GRAZ])),
    "Python": (PYTHON, ("", [GRAZ])),
    "several": ('[weather(city="Linz"), now()]', ("", [("weather", {"city": "Linz"}), ("now", {})])),
    "one behind the other": (f'\n{JSON}; {{"name": "now"}}\n', ("", [GRAZ, ("now", {})])),
    "a list": ('[{"name": "now", "parameters": {}}]', ("", [("now", {})])),
    "its type": ('{"type": "function", "name": "now", "parameters": {}}', ("", [("now", {})])),
    "in marks": (f"<|python_start|>{PYTHON}<|python_end|>", ("", [GRAZ])),
    "behind marks": (f"<|python_start|>I look.<|python_end|>{JSON}", ("I look.", [GRAZ])),
    "behind words": (f"I look. <|python_start|>{PYTHON}", ("I look. ", [GRAZ])),
    "words": ("It rains [1].", ("It rains [1].", [])),
    "a list of something else": ("[1, 2, 3]", ("[1, 2, 3]", [])),
    "an object": ('{"name": "Graz", "parameters": {}}', ('{"name": "Graz", "parameters": {}}', [])),
    "another object": ('{"rain": true}', ('{"rain": true}', [])),
    "somebody else's": ("[forecast()] is no tool.", ("[forecast()] is no tool.", [])),
    "code": ("<|python_start|>print(1)<|python_end|>", ("print(1)", [])),
    "half of one": ("[weather(city=", ("[weather(city=", [])),
    "white space": (" \n", (" \n", [])),
    "words without marks": (f"I look: {JSON}", (f"I look: {JSON}", [])),
}


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=20)
@given(places=st.lists(st.integers(0, 200), max_size=12))
def test_an_answer_is_the_same_wherever_it_is_cut(name: str, places: list[int]) -> None:
    text, expected = ANSWERS[name]
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    for cut in (parts, [text], list(text)):
        assert read(cut) == expected


def test_what_cannot_be_a_call_comes_at_once() -> None:
    parser = known("llama json").parser([], functions=FUNCTIONS)
    assert [piece.content for piece in parser.add("[1")] == ["[1"]
    parser = known("llama json").parser([], functions=FUNCTIONS)
    assert not list(parser.add('{"na'))
    assert [piece.content for piece in parser.add("tion")] == ['{"nation']


def test_calls_that_are_cut_off_nobody_offered_or_follow_the_only_one() -> None:
    for text in (JSON, PYTHON):
        for at in range(1, len(text)):
            assert read([text[:at]], cut=True) == ("", [])
        assert read([f"<|python_start|>{text}"], None) == (text, []), "the marks are special tokens"
    assert read([f"{JSON}{JSON} And?"], one_call=True) == ("", [GRAZ])
    assert read(["[now(), now()]"], one_call=True) == ("", [("now", {})])


@pytest.mark.parametrize("name", LLAMAS)
def test_the_template_chooses_the_style_and_the_grammar_demands_it(name: str) -> None:
    answers = known(name)
    wanted, other = (JSON, PYTHON) if name == "llama json" else (PYTHON, JSON)

    def accepts(text: str) -> bool:
        found = matcher(answers.tokenizer, lark_grammar(answers.grammar(FUNCTIONS)), tiny_models.VOCAB)
        ids = answers.tokenizer(text, add_special_tokens=False)["input_ids"]
        return all(map(found.consume_token, ids)) and bool(found.is_accepting())

    assert isinstance(answers, LlamaFormat)
    assert accepts(wanted)
    for wrong in (other, "It rains.", wanted.replace("3", '"3"'), wanted.replace("weather", "forecast")):
        assert not accepts(wrong)


@pytest.mark.parametrize("name", LLAMAS)
def test_calls_and_results_are_shown_to_the_model_again(name: str) -> None:
    answers = known(name)
    function = {"name": "weather", "arguments": '{"city": "Graz"}'}
    calling = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": function}]}
    result = {"role": "tool", "tool_call_id": "a", "content": "It does."}
    ids = encode_prompt(answers.tokenizer, [QUESTION, calling, result], answers=answers)
    shown = answers.tokenizer.decode(ids)
    call = {
        "llama json": '{"name": "weather", "parameters": {"city": "Graz"}}',
        "llama python": '[weather(city="Graz")]',
    }[name]
    assert f"<assistant>{call}<tool>It does." in shown


def test_its_turns_end_with_either_mark() -> None:
    dialect = LLAMAS["llama json"]
    answers = answer_format(tokenizer_of(dialect._replace(special=(*dialect.special, "<|eot|>", "<|eom|>"))))

    class Ends:
        eos_token_id: Any = 1

    config = Ends()
    complete_ends(config, answers)
    assert config.eos_token_id == [1, *answers.tokenizer.convert_tokens_to_ids(["<|eot|>", "<|eom|>"])]
