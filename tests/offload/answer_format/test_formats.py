"""Answers in each format: read wherever they are cut, demanded by a grammar, and shown to the model again."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import OptionError
from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.choose import answer_format
from moe_local.offload.answer_format.ends import complete_ends
from moe_local.offload.answer_format.marked import MarkedFormat
from moe_local.offload.answer_format.piece import Parser, Piece
from moe_local.offload.engine.grammar import matcher
from moe_local.offload.engine.text import Detokenizer, encode_prompt
from moe_local.offload.forms import lark_grammar
from support import tiny_models
from support.chat_templates import CALLS, DIALECTS, END, TURNS, Dialect, tokenizer_of

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "near": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
FUNCTIONS = {"weather": SCHEMA, "now": None}
GIVEN = {"city": 'Graz "<b>"\nAustria', "days": 3, "unit": "C", "near": ["Linz"]}
CALL = {"name": "weather", "arguments": GIVEN}
MARKED = [name for name in DIALECTS if name != "harmony"]
"""Without channels, and with answers that may go on behind a call."""
TAGGED = ["qwen", "glm", "compact glm", "minimax"]
"""Whose arguments are no JSON."""
FEW = settings(max_examples=20)
QUESTION = {"role": "user", "content": "Will it rain?"}


@cache
def known(name: str) -> AnswerFormat:
    return answer_format(tokenizer_of(DIALECTS[name]))


def called(name: str = "weather", given: Any = GIVEN, number: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(given)}
    return {"id": f"call_of_somebody_else_{number}", "type": "function", "function": function}


def asked(answers: AnswerFormat, *calls: dict[str, Any], **said: Any) -> str:
    """The prompt after calls and their results, as text."""
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [*calls], **said}]
    messages += [
        {"role": "tool", "tool_call_id": call["id"], "content": f"result {n}"} for n, call in enumerate(calls)
    ]
    ids = encode_prompt(answers.tokenizer, messages, tools=TOOLS, answers=answers)
    return str(answers.tokenizer.decode(ids))


def written(answers: AnswerFormat, *calls: dict[str, Any]) -> str:
    """How the template writes calls, which is how the model does."""
    text = asked(answers, *calls)
    opening = "<|start|>assistant" if "<|start|>" in text else "<assistant>"
    text = text[text.index(opening) + len(opening) :]
    ends = ("<tool>", "</s>", "<|start|>functions.", "<|tool_response>")
    return text[: min(at for end in ends if (at := text.find(end)) >= 0)]


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def read(parser: Parser, parts: list[str], **ended: Any) -> tuple[str, str, list[Any]]:
    """Reasoning, content, and calls with their arguments."""
    pieces = [piece for part in parts for piece in parser.add(part)]
    pieces += parser.flush(**ended)
    calls = [{**p.call, "arguments": json.loads(p.call["arguments"])} for p in pieces if p.call]
    return "".join(p.reasoning for p in pieces), "".join(p.content for p in pieces), calls


def parser_of(name: str, **options: Any) -> Parser:
    answers = known(name)
    prompt = encode_prompt(answers.tokenizer, [QUESTION])
    return answers.parser(prompt, functions=FUNCTIONS, **options)


@pytest.mark.parametrize("name", DIALECTS)
def test_a_call_as_the_template_writes_it_wherever_it_is_cut(name: str) -> None:
    text = written(known(name), called())
    for parts in ([text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))):
        assert read(parser_of(name), parts) == ("", "", [CALL])


@pytest.mark.parametrize("name", MARKED)
@FEW
@given(places=st.lists(st.integers(0, 800), max_size=20), one_call=st.booleans())
def test_several_calls_behind_a_thought_and_words(name: str, places: list[int], one_call: bool) -> None:
    answers = known(name)
    assert isinstance(answers, MarkedFormat)
    thought = f"{answers.thoughts.begin}\nHm.\n{answers.thoughts.closing}"
    text = f"{thought}\n\nI look." + written(answers, called(), called("now", {}, 1))
    reasoning, content, calls = read(parser_of(name, one_call=one_call), cut(text, places))
    assert (reasoning, content.strip()) == ("\nHm.\n", "I look.")
    assert calls == [CALL, {"name": "now", "arguments": {}}][: 1 if one_call else 2]


@pytest.mark.parametrize("name", DIALECTS)
def test_a_call_that_is_cut_off_is_left_out(name: str) -> None:
    answers = known(name)
    text = written(answers, called()).lstrip("\n")
    marks = answers.syntax.marks if isinstance(answers, MarkedFormat) else (" to=",)
    opened = max(len(mark) for mark in (*marks, *answers.tokens.ids) if text.startswith(mark))
    for at in range(opened, len(text)):
        reasoning, content, calls = read(parser_of(name), [text[:at]], cut=True)
        assert (reasoning, content) == ("", "")
        assert calls in ([], [CALL]), "whole but for what closes the section"


@pytest.mark.parametrize("name", DIALECTS)
@FEW
@given(places=st.lists(st.integers(0, 400), max_size=12))
def test_what_is_no_call_is_content(name: str, places: list[int]) -> None:
    text = written(known(name), called())
    broken = re.sub('(days"?[:=] ?)3', r"\g<1>3]", text).replace("<arg_value>", "<arg_worth>")
    broken = broken.replace("<parameter", "<parameters").replace("｜parameter ", "｜parameters ")
    assert broken != text
    reasoning, content, calls = read(parser_of(name), cut(broken, places))
    assert (reasoning, calls) == ("", [])
    assert content.strip() == broken.strip()


@pytest.mark.parametrize("name", DIALECTS)
@FEW
@given(data=st.data(), cut_off=st.booleans(), one_call=st.booleans())
def test_any_text_is_read_alike_wherever_it_is_cut(
    name: str, data: st.DataObject, cut_off: bool, one_call: bool
) -> None:
    answers = known(name)
    marks = ["<think>", "</think>", "thought\n", *answers.tokens.ids]
    marks += answers.syntax.marks if isinstance(answers, MarkedFormat) else ()
    words = [
        " ",
        "\n",
        "{",
        "}",
        "[]",
        "<",
        "now",
        ":0",
        " to=functions.now",
        "assistant",
        "final",
        "analysis",
    ]
    call = written(answers, called("now", {}))
    text = "".join(data.draw(st.lists(st.sampled_from([*marks, *words, call]), max_size=12)))
    places = data.draw(st.lists(st.integers(0, 400), max_size=12))
    whole, parted = (
        read(parser_of(name, one_call=one_call), parts, cut=cut_off) for parts in ([text], cut(text, places))
    )
    assert whole == parted


@FEW
@given(places=st.lists(st.integers(0, 400), max_size=12), closed=st.booleans())
def test_a_call_of_qwen_without_its_opening_mark(places: list[int], closed: bool) -> None:
    text = written(known("qwen"), called()).strip().removeprefix("<tool_call>").lstrip()
    text = text if closed else text.removesuffix("</tool_call>")
    assert read(parser_of("qwen"), cut(f"I look.\n{text}", places)) == ("", "I look.\n", [CALL])


def test_what_only_begins_like_a_call_of_qwen_is_content() -> None:
    for text in ("They begin with <function=NAME> and end with </tool_call>.\n", "It was <function=NAME>."):
        assert read(parser_of("qwen"), list(text)) == ("", text, [])


@pytest.mark.parametrize("name", MARKED)
def test_without_functions_a_call_is_content(name: str) -> None:
    answers = known(name)
    text = f"So: {written(answers, called())}"
    assert read(answers.parser([]), list(text)) == ("", text, [])


@pytest.mark.parametrize("name", DIALECTS)
def test_the_grammar_takes_what_the_template_writes(name: str) -> None:
    answers = known(name)
    found = matcher(answers.tokenizer, lark_grammar(answers.grammar(FUNCTIONS)), tiny_models.VOCAB)
    text = re.sub(', "id": "[^"]*"', "", written(answers, called()))  # which models may leave out
    for token in answers.tokenizer(text, add_special_tokens=False)["input_ids"]:
        if found.is_stopped() or answers.tokenizer.decode([token]) == "<|call|>":
            break
        assert found.consume_token(token), (text, found.get_error())
    assert found.is_accepting()


@pytest.mark.parametrize("name", DIALECTS)
def test_the_text_keeps_the_marks_and_drops_other_special_tokens(name: str) -> None:
    answers = known(name)
    text = written(answers, called())
    ids = answers.tokenizer(text + "</s>", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(answers.tokenizer, **answers.options)
    assert "".join(map(detokenizer.add, ids)) + detokenizer.flush() == text
    assert set(answers.options.get("marks", ())) == set(DIALECTS[name].special)


@pytest.mark.parametrize("name", DIALECTS)
def test_calls_of_others_and_their_results_are_shown_in_the_form_that_the_template_wants(name: str) -> None:
    text = asked(known(name), called(), called("now", {}, 1))
    assert text.count("result") == 2
    assert "<again>" not in text
    if name == "kimi":
        assert "functions.weather:0" in text
        assert "functions.now:1" in text
    if name == "harmony":
        order = ["to=functions.weather", "result 0", "to=functions.now", "result 1"]
        assert sorted(order, key=text.index) == order


def test_arguments_with_tags_are_an_object_even_where_text_would_pass() -> None:
    """As Gemma 4's template has it, and repaired ones of GLM."""
    tags = "{% for k, v in f.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}"
    both = f"{{% if f.arguments is mapping %}}{tags}{{% else %}}{{{{ f.arguments }}}}{{% endif %}}"
    answers = answer_format(
        tokenizer_of(Dialect(f"{TURNS}{{{{ m.content }}}}{CALLS}{{{{ f.name }}}}{both}{{% endfor %}}{END}"))
    )
    assert "<city>Graz" in asked(answers, called(given={"city": "Graz"}))


@pytest.mark.parametrize("name", DIALECTS)
def test_white_space_beside_calls_is_shown_as_no_content(name: str) -> None:
    answers = answer_format(tokenizer_of(DIALECTS[name]))
    assert asked(answers, called(), content="\n") == asked(answers, called(), content="")


def test_arguments_that_a_template_passes_on_are_shown_as_they_were_written() -> None:
    for name in ("hermes", "deepseek", "kimi", "new mistral", "harmony"):
        call = called()
        call["function"]["arguments"] = '{"city":"Graz" ,"days":3}'
        assert '{"city":"Graz" ,"days":3}' in asked(known(name), call)


def test_ids_of_mistrals_calls() -> None:
    answers = known("mistral")
    mine = answers.call_id()
    call = {**called(), "id": mine}
    assert mine.isalnum()
    assert f'"id": "{mine}"' in asked(answers, call)
    assert asked(answers, called()) == asked(answers, called()), "the same in each request"


ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
HARMONY: dict[str, tuple[str, tuple[str, str, list[Any]]]] = {
    "a thought": (f"{ANALYSIS}Hm.<|end|>{FINAL}Yes, 1 < 2.<|return|>", ("Hm.", "Yes, 1 < 2.", [])),
    "no thought": ("<|channel|>final<|message|>Yes.<|return|>", ("", "Yes.", [])),
    "a format": (
        "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
        ("", "{}", []),
    ),
    "a recipient in the channel": (
        f"{ANALYSIS}Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json"
        "<|message|>{}<|call|>",
        ("Hm.", "", [{"name": "now", "arguments": {}}]),
    ),
    "a recipient in the role": (
        f"{ANALYSIS}Hm.<|end|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>"
        "<|call|>",
        ("Hm.", "", [{"name": "now", "arguments": {}}]),
    ),
    "words before a call": (
        f"{ANALYSIS}Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=now<|message|>{}<|end|>",
        ("Hm.", "I look.", [{"name": "now", "arguments": {}}]),
    ),
    "two messages of a kind": (
        f"{ANALYSIS}A.<|end|><|start|>assistant{ANALYSIS}B.<|end|>{FINAL}C.<|start|>assistant"
        "<|channel|>final<|message|>D.",
        ("A.\n\nB.", "C.\n\nD.", []),
    ),
    "a tool that nobody has": (
        "<|channel|>analysis to=python code<|message|>1 + 1<|call|>",
        ("1 + 1", "", []),
    ),
    "no JSON": (
        "<|channel|>commentary to=functions.now<|message|>{<|call|>",
        ("", "<|channel|>commentary to=functions.now<|message|>{<|call|>", []),
    ),
    "no channel": ("Hello, total <|strange|> stranger.", ("", "Hello, total <|strange|> stranger.", [])),
    "no mark ends it": (f"{ANALYSIS}Hm.", ("Hm.", "", [])),
}


@pytest.mark.parametrize("case", HARMONY)
@FEW
@given(places=st.lists(st.integers(0, 400), max_size=20))
def test_messages_in_channels(case: str, places: list[int]) -> None:
    text, expected = HARMONY[case]
    assert read(parser_of("harmony"), cut(text, places)) == expected


def test_content_comes_at_once() -> None:
    parser = parser_of("harmony")
    assert list(parser.add(f"{ANALYSIS}Hm")) == [Piece(reasoning="Hm")]
    assert parser.thinking
    assert list(parser.add(" <")) == [Piece(reasoning=" ")]
    assert list(parser.add(f"|end|>{FINAL}")) == []
    assert not parser.thinking
    assert list(parser.add("A")) == [Piece(content="A")]


def test_nothing_follows_the_only_call_in_a_channel() -> None:
    parser = parser_of("harmony", one_call=True)
    call = "<|channel|>commentary to=functions.now<|message|>{}<|call|>"
    assert read(parser, [call, f"<|start|>assistant{call}"])[2] == [{"name": "now", "arguments": {}}]
    assert parser.done


def test_a_message_that_the_prompt_has_begun() -> None:
    answers = known("harmony")
    ids = answers.tokenizer(f"<|start|>user<|message|>Hi<|end|>{FINAL}It is")["input_ids"]
    assert read(answers.parser(ids), [" raining.", "<|return|>"]) == ("", " raining.", [])


def test_thoughts_are_shown_beside_calls_only() -> None:
    answers = known("harmony")
    text = asked(answers, called(), reasoning_content="I need it.", content="I look.")
    assert "<|channel|>analysis<|message|>I need it.\n\nI look.<|end|>" in text
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    ids = encode_prompt(answers.tokenizer, answers.messages([QUESTION, said, QUESTION]))
    text = answers.tokenizer.decode(ids)
    assert "<|channel|>final<|message|>Yes.<|end|>" in text
    assert "Hm." not in text


def test_tools_with_nothing_but_a_name() -> None:
    bare = [{"type": "function", "function": {"name": "now", "description": None}}]
    for name in DIALECTS:
        answers = known(name)
        text = answers.tokenizer.decode(
            encode_prompt(answers.tokenizer, [QUESTION], tools=answers.tools(bare))
        )
        assert "now" in text


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "many", "many"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
        ({"type": "boolean"}, "True", True),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"$ref": "#/$defs/Name"}, "5", "5"),
        ({"$ref": "#/$defs/Circle"}, "5", 5),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({}, "true", True),
        ({}, "[1", "[1"),
    ],
)
@pytest.mark.parametrize("name", TAGGED)
def test_what_the_text_of_an_argument_means(name: str, schema: Any, text: str, value: Any) -> None:
    answers = known(name)
    defined = {"Name": {"type": "string"}, "Circle": {"$ref": "#/$defs/Circle"}}
    functions = {"f": {"type": "object", "properties": {"p": schema}, "$defs": defined}}
    call = written(answers, called("f", {"p": text}))
    assert text in call
    (found,) = read(answers.parser([], functions=functions), [call])[2]
    assert found == {"name": "f", "arguments": {"p": value}}


def test_deepseeks_arguments_say_themselves_whether_they_are_text() -> None:
    answers = known("dsml")
    functions = {"f": {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}}
    for said in ({"n": 5}, {"n": "5"}, {"s": "5"}, {"other": "[1]"}, {"other": [1, None]}):
        (found,) = read(answers.parser([], functions=functions), [written(answers, called("f", said))])[2]
        assert found["arguments"] == said
    call = written(answers, called("f", {"n": 5, "s": "</b>"}))
    for text, right in (
        (call, True),
        (call.replace(">5<", ">five<"), False),
        (call.replace('name="n" string="false"', 'name="n" string="true"'), False),
    ):
        mask = matcher(answers.tokenizer, lark_grammar(answers.grammar(functions)), tiny_models.VOCAB)
        ids = answers.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert all(map(mask.consume_token, ids)) == right


def test_schemas_that_are_none_are_refused() -> None:
    for name in ("hermes", "deepseek", "mistral", "kimi", "granite", "harmony"):
        with pytest.raises(OptionError, match="json_schema is of type str"):
            known(name).grammar({"f": "x"})


def test_an_effort_turns_mistrals_thoughts_on_and_off() -> None:
    """In words of others, too; and what says that they be off wins."""
    answers = known("mistral 4")

    def effort(**variables: Any) -> str:
        ids = encode_prompt(answers.tokenizer, [QUESTION], variables=variables, answers=answers)
        found = re.search('"reasoning_effort": "(.*?)"', answers.tokenizer.decode(ids))
        return found[1] if found else ""

    on, off = answers.thinking(True), answers.thinking(False)
    assert (effort(), effort(**on), effort(**off)) == ("none", "high", "none")
    for said in ("minimal", "medium", "xhigh", "high"):
        assert effort(reasoning_effort=said) == "high"
    assert effort(reasoning_effort="none") == "none"
    assert effort(thinking=True) == "high"
    assert effort(**{**off, **on}) == "high", "a request's word against the server's"
    assert effort(enable_thinking=False, thinking=False, reasoning_effort="medium") == "none"
    assert effort(**on, reasoning_effort="none") == "none"


def test_an_effort_is_left_as_it_is_where_it_is_no_switch() -> None:
    template = f"{{{{ reasoning_effort | default('medium') }}}}{DIALECTS['hermes'].template}"
    answers = answer_format(tokenizer_of(DIALECTS["hermes"]._replace(template=template)))
    for said in ("none", "low", "high"):
        assert answers.variables({"reasoning_effort": said, "enable_thinking": True}) == {
            "reasoning_effort": said,
            "enable_thinking": True,
        }
    with pytest.raises(OptionError, match=r"^thoughts cannot be turned on: .* or reasoning_effort that does"):
        answers.thinking(True)


PLACELESS = {
    "neither": "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}{% endfor %}",
    "no calls": f"{TURNS}{{{{ m.content }}}}{END}",
    "no calls, and no such role": "{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'tool' %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}",
    "no results": f"{TURNS}{{{{ m.content if m.role != 'tool' }}}}{CALLS}{{{{ f.name }}}}{{% endfor %}}{END}",
}


@pytest.mark.parametrize(
    ("name", "place"), [("neither", 1), ("no calls", 1), ("no calls, and no such role", 1), ("no results", 2)]
)
def test_calls_and_results_that_a_template_would_leave_out_are_refused(name: str, place: int) -> None:
    answers = answer_format(tokenizer_of(Dialect(PLACELESS[name])))
    what = {1: "calls of tools", 2: "the result of a call"}[place]
    calling = {"role": "assistant", "content": "I look.", "tool_calls": [called("now", {})]}
    result = {"role": "tool", "tool_call_id": called()["id"], "content": "result"}
    with pytest.raises(
        OptionError, match=f"^message {place} has {what}, for which .* has no place; .*"
    ) as said:
        encode_prompt(answers.tokenizer, [QUESTION, calling, result], answers=answers)
    assert "\n" not in str(said.value)
    if place == 1:
        with pytest.raises(OptionError, match=r"^message 1 has calls of tools"):
            encode_prompt(answers.tokenizer, [QUESTION, calling, QUESTION], answers=answers)
    plain = {"role": "assistant", "content": "No.", "tool_calls": []}
    assert encode_prompt(answers.tokenizer, [QUESTION, plain, QUESTION], answers=answers)


FREE = {"type": "object", "additionalProperties": {"type": "integer"}}


@pytest.mark.parametrize("name", ["hermes", *TAGGED, "dsml", "gemma", "lfm", "harmony"])
def test_a_function_without_named_parameters_takes_any(name: str) -> None:
    answers = known(name)

    def accepts(schema: Any, given: Any) -> bool:
        mask = matcher(answers.tokenizer, lark_grammar(answers.grammar({"f": schema})), tiny_models.VOCAB)
        text = written(answers, called("f", given))
        ids = answers.tokenizer(text.removesuffix("<|call|>"), add_special_tokens=False)["input_ids"]
        return all(map(mask.consume_token, ids)) and bool(mask.is_accepting())

    for said in ({}, {"a": 1}, {"one_two": 1, "b": -2}):
        assert accepts(FREE, said), said
        assert accepts({"$ref": "#/$defs/Any", "$defs": {"Any": FREE}}, said)
    assert accepts({"type": "object"}, {"a": 1, "b": [True, None]})
    assert not accepts(FREE, {"a": [1]})
    for none in (None, {}, {"type": "object", "additionalProperties": False}):
        assert accepts(none, {})
        assert not accepts(none, {"a": 1})


class Ends:
    def __init__(self, eos_token_id: Any) -> None:
        self.eos_token_id = eos_token_id


def test_ends_that_a_checkpoint_does_not_name() -> None:
    answers = known("harmony")
    ends, call, result = (answers.tokens.ids[f"<|{name}|>"] for name in ("end", "call", "return"))
    for said in (result, None, [result, ends]):
        config = Ends(said)
        complete_ends(config, answers)
        assert set(config.eos_token_id) == {call, result}
    config = Ends(7)
    complete_ends(config, known("hermes"))
    assert config.eos_token_id == 7
