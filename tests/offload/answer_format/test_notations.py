"""Calls whose arguments are in a notation of their own: Gemma's, and LFM's Python."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.choose import answer_format
from moe_local.offload.answer_format.ends import complete_ends
from moe_local.offload.answer_format.gemma import Gemma
from moe_local.offload.answer_format.lfm import Lfm
from moe_local.offload.answer_format.piece import Call, Parser
from moe_local.offload.engine.grammar import matcher
from moe_local.offload.engine.text import encode_prompt
from moe_local.offload.forms import lark_grammar
from support import tiny_models
from support.chat_templates import DIALECTS, tokenizer_of

QUESTION = {"role": "user", "content": "Will it rain?"}
NAMES = {"f": {"type": "object", "properties": {"a": {}, "b": {}}}}


@cache
def known(name: str) -> AnswerFormat:
    return answer_format(tokenizer_of(DIALECTS[name]))


def meant(calls: list[Call] | None) -> list[tuple[str, Any]] | None:
    return calls and [(call["name"], json.loads(call["arguments"])) for call in calls]


def said(parser: Parser, text: str) -> tuple[str, str, list[str]]:
    pieces = [piece for letter in text for piece in parser.add(letter)] + [*parser.flush()]
    calls = [piece.call["name"] for piece in pieces if piece.call]
    return "".join(piece.reasoning for piece in pieces), "".join(piece.content for piece in pieces), calls


def calling(*names: str, arguments: str = "{}", **said: Any) -> list[dict[str, Any]]:
    """A conversation with calls and, the last one first, their results."""
    functions = [{"name": name, "arguments": arguments} for name in names]
    calls = [{"id": f"id_{f['name']}", "type": "function", "function": f} for f in functions]
    results = [{"role": "tool", "tool_call_id": f"id_{n}", "content": f"of {n}"} for n in reversed(names)]
    return [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls, **said}, *results]


def shown(answers: AnswerFormat, messages: list[dict[str, Any]]) -> str:
    before = json.dumps(messages)
    text = str(answers.tokenizer.decode(encode_prompt(answers.tokenizer, messages, answers=answers)))
    assert json.dumps(messages) == before, "the conversation itself is not changed"
    return text


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("call:f{}", {}),
        (' call:f{a:<|"|>x: {y}, "z"<|"|>,b:-1.5e3}', {"a": 'x: {y}, "z"', "b": -1500.0}),
        ("call:f{a:[true,None,{b:[]}],b:null}", {"a": [True, None, {"b": []}], "b": None}),
        ('call:f{<|"|>a<|"|>:1,"b":"\\u00fc, <|"}', {"a": 1, "b": "ü, <|"}),
        ('call:f{{"a": 1}}', {"a": 1}),
        ("call:f{ a : New York , b : True }", {"a": "New York", "b": True}),
        ("call:f{a:NaN,b:007}", {"a": "NaN", "b": "007"}),
        ('call:f{a:<|"|><|"|>}', {"a": ""}),
    ],
)
def test_what_a_call_of_gemma_means(text: str, arguments: Any) -> None:
    assert meant(Gemma().parse(text, NAMES)) == [("f", arguments)]


@pytest.mark.parametrize(
    "text",
    ["", "call:f", "f{}", "call:f{a:}", "call:f{a:1}}", 'call:f{a:<|"|>x}', "call:f{a:1 b<2}", "call:f[1]"],
)
def test_what_is_no_call_of_gemma(text: str) -> None:
    assert Gemma().parse(text, NAMES) is None


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f()]", [("f", {})]),
        ("f(a=1)", [("f", {"a": 1})]),
        ("""[f(a='it\\'s', b="x\ny"), g(c=-1.5)]""", [("f", {"a": "it's", "b": "x\ny"}), ("g", {"c": -1.5})]),
        ("""[f(a={"b": [true, null]}, b=(1, None))]""", [("f", {"a": {"b": [True, None]}, "b": [1, None]})]),
        (r"[f(a='\d \\d \u00fc \'')]", [("f", {"a": r"\d \d ü '"})]),
        ("[f(1, b='x')]", [("f", {"a": 1, "b": "x"})]),
        ("[my-own-f(a=1)]", [("my-own-f", {"a": 1})]),
        ("[files.read(a='x')]", [("files.read", {"a": "x"})]),
        ('[{"name": "f", "arguments": {"a": 1}}]', [("f", {"a": 1})]),
    ],
)  # fmt: skip
def test_what_calls_of_lfm_mean(text: str, calls: Any) -> None:
    assert meant(Lfm().parse(text, NAMES)) == calls


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            "f",
            "[f]",
            "[f(a=b)]",
            "[f(1, 2, 3)]",
            "[f(**{'a': 1})]",
            "[f(a=b'x')]",
            "[f(a={1, 2})]",
        ),
        *("[f(a=float('nan'))]", "f(", "[f(a=1), 2]", "(" * 10_000, "-" * 100_000 + "f()", "[f(a=\0)]"),
        "[f(a=1e999)]",
    ],
)
def test_what_is_no_call_of_lfm(text: str) -> None:
    assert Lfm().parse(text, NAMES) is None


TYPES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "text": ({"type": "string"}, ["", 'a "b" {c}', "<b>\n"], [1, None, []]),
    "whole numbers": ({"type": "integer", "minimum": 0}, [0, 12], [-1, 1.5, "1"]),
    "numbers": ({"type": "number"}, [0, -1.5], ["1", True]),
    "truth": ({"type": "boolean"}, [True, False], [1, "true"]),
    "choices": ({"enum": ["C", 3, None]}, ["C", 3, None], ["F", 4, True]),
    "perhaps": ({"type": ["string", "null"]}, ["x", None], [1]),
    "one of": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["x", True]),
    "a list": ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["a"], 1]),
    "any list": ({"type": "array"}, [[], [1, "a", [None]]], [1]),
    "elsewhere": ({"$ref": "#/$defs/Name"}, ["x"], [1]),
    "anything": ({}, [1, "a", None, True, [1, "b"]], []),
}


def accepts(answers: AnswerFormat, functions: dict[str, Any], text: str) -> bool:
    found = matcher(answers.tokenizer, lark_grammar(answers.grammar(functions)), tiny_models.VOCAB)
    ids = answers.tokenizer(text, add_special_tokens=False)["input_ids"]
    return (
        all(not found.is_stopped() and found.consume_token(token) for token in ids) and found.is_accepting()
    )


def call_text(answers: AnswerFormat, arguments: Any) -> str:
    """As the template writes it."""
    text = shown(answers, calling("f", arguments=json.dumps(arguments)))
    return text.split("<assistant>")[1].split("<tool>")[0].split("<|tool_response>")[0]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["gemma", "lfm"])
def test_the_grammar_binds_arguments_to_their_schema(name: str, kind: str) -> None:
    schema, right, wrong = TYPES[kind]
    functions = {"f": {"type": "object", "properties": {"p": schema}, "$defs": {"Name": {"type": "string"}}}}
    for value in right:
        assert accepts(known(name), functions, call_text(known(name), {"p": value})), value
    for value in wrong:
        assert not accepts(known(name), functions, call_text(known(name), {"p": value})), value
    assert accepts(known(name), functions, call_text(known(name), {})), "it is not required"


def test_objects_in_gemmas_calls() -> None:
    inner = {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": "string"}},
        "required": ["y"],
    }
    functions = {"f": {"type": "object", "properties": {"place": inner, "free": {"type": "object"}}}}
    for right in (
        {"place": {"y": "a"}},
        {"place": {"x": 1, "y": "a"}},
        {"free": {}},
        {"free": {"a": {"b": [1]}, "c": 2}},
    ):
        assert accepts(known("gemma"), functions, call_text(known("gemma"), right)), right
    for wrong in (
        {"place": {}},
        {"place": {"x": 1}},
        {"place": {"x": "a", "y": "a"}},
        {"place": 1},
        {"free": 1},
    ):
        assert not accepts(known("gemma"), functions, call_text(known("gemma"), wrong)), wrong


@pytest.mark.parametrize("name", ["gemma", "lfm"])
def test_parameters_that_are_required_and_those_that_are_not(name: str) -> None:
    number = {"type": "integer"}
    given = {"type": "object", "properties": dict.fromkeys("abcd", number), "required": ["b", "d"]}
    for keys, right in (
        ("bd", True),
        ("abcd", True),
        ("bcd", True),
        ("abd", True),
        ("ab", False),
        ("acd", False),
        ("", False),
    ):
        assert accepts(known(name), {"f": given}, call_text(known(name), dict.fromkeys(keys, 1))) == right, (
            keys
        )


def test_a_schema_may_refer_to_itself() -> None:
    """Twice, which must not make twice as many rules of each level as of the one above."""
    side = {"$ref": "#/$defs/Node"}
    node = {"type": "object", "properties": {"left": side, "right": side, "n": {"type": "integer"}}}
    functions = {"f": {"type": "object", "properties": {"tree": side}, "$defs": {"Node": node}}}
    assert known("gemma").grammar(functions).count("\n") < 20
    deep: dict[str, Any] = {"n": 1}
    for _ in range(20):
        deep = {"left": deep, "right": {"n": 2}}
    assert accepts(known("gemma"), functions, call_text(known("gemma"), {"tree": deep}))
    wrong = {"tree": {"left": {"right": {"n": "1"}}}}
    assert not accepts(known("gemma"), functions, call_text(known("gemma"), wrong))
    circle = {
        "f": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/A"}},
            "$defs": {"A": {"$ref": "#/$defs/A"}},
        }
    }
    assert accepts(known("gemma"), circle, call_text(known("gemma"), {"a": 1}))


def test_gemmas_thoughts() -> None:
    answers = known("gemma")
    told = encode_prompt(answers.tokenizer, [QUESTION], variables={"enable_thinking": True})
    untold = encode_prompt(answers.tokenizer, [QUESTION])
    thought = "<|channel>thought\nHm, <b>.\n<channel|>Yes."
    assert said(answers.parser(told), thought) == ("Hm, <b>.\n", "Yes.", [])
    assert said(answers.parser(untold), "Yes.") == ("", "Yes.", [])
    assert said(answers.parser(untold), thought) == ("Hm, <b>.\n", "Yes.", [])
    begun = answers.tokenizer("<assistant><|channel>thought\n")["input_ids"]
    assert said(answers.parser(begun), "Hm.<channel|>Yes.") == ("Hm.", "Yes.", [])
    assert answers.thinking(True) == {"enable_thinking": True}


def test_mistrals_thoughts() -> None:
    dialect = DIALECTS["new mistral"]
    marks = ("[THINK]", "[/THINK]")
    answers = answer_format(
        tokenizer_of(
            dialect._replace(
                template=f"{{# {marks} #}}{dialect.template}", special=(*dialect.special, *marks)
            )
        )
    )
    assert set(answers.options["marks"]) >= {*marks}
    assert said(answers.parser([]), "[THINK]Hm.[/THINK]Yes.") == ("Hm.", "Yes.", [])


@pytest.mark.parametrize(("name", "opening"), [("gemma", "<|channel>thought\n"), ("kimi", "<think>")])
def test_a_call_ends_a_thought_that_was_not_closed(name: str, opening: str) -> None:
    answers = known(name)
    call = call_text(answers, {})
    assert said(answers.parser([], functions={"f": None}), f"{opening}Hm.{call}") == ("Hm.", "", ["f"])
    assert said(answers.parser([]), f"{opening}Hm.{call}") == (f"Hm.{call}", "", [])


def test_results_are_within_gemmas_message_and_its_turn_goes_on() -> None:
    text = shown(known("gemma"), calling("f", "g"))
    result = '<|tool_response>response:{0}{{value:<|"|>of {0}<|"|>}}<tool_response|>'
    calls = "<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|>"
    end = f"<assistant>{calls}{result.format('g')}{result.format('f')}<|channel>thought\n<channel|>"
    assert text.endswith(end)
    assert "response:id_g" in shown(known("new gemma"), calling("f", "g")), "as the template looks for it"


@pytest.mark.parametrize("name", ["gemma", "lfm"])
def test_thoughts_are_shown_beside_calls(name: str) -> None:
    text = shown(known(name), calling("f", reasoning_content="I need it."))
    opening = {"gemma": "<|channel>thought\n", "lfm": "<think>"}[name]
    assert f"<assistant>{opening}I need it.<" in text


def test_calls_that_lfms_first_templates_do_not_show() -> None:
    arguments = '{"a": "it\'s", "b": [1, null]}'
    text = shown(known("old lfm"), calling("f", arguments=arguments, content="I look."))
    assert (
        """<assistant><|tool_call_start|>[f(a="it's", b=[1, None])]<|tool_call_end|>I look.<tool>""" in text
    )


class Ends:
    eos_token_id: Any = 1


def test_gemma_ends_where_a_result_begins() -> None:
    dialect = DIALECTS["gemma"]
    answers = answer_format(tokenizer_of(dialect._replace(special=(*dialect.special, "<|tool_response>"))))
    config = Ends()
    complete_ends(config, answers)
    assert config.eos_token_id == [1, answers.tokenizer.convert_tokens_to_ids("<|tool_response>")]
