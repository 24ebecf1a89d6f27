"""What a model may write before what is demanded of it: a thought, or the header of a channel."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.choose import answer_format
from moe_local.offload.engine.grammar import matcher
from moe_local.offload.engine.sampling import form
from moe_local.offload.engine.text import encode_prompt
from support import tiny_models
from support.chat_templates import DIALECTS, HYBRID, THINKING, Dialect, tokenizer_of

SCHEMA = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
JSON = '{"sure": true}'
QUESTION = {"role": "user", "content": "Will it rain?"}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
TELLING = Dialect(
    "{{ 'Think.' if enable_thinking }}" + HYBRID.template.replace("enable_thinking is def", "x is def")
)
"""Whose prompts end alike, whether thoughts are on or off."""
KNOWN = {**DIALECTS, "hybrid": HYBRID, "thinking": THINKING, "telling": TELLING}
GEMMAS = "<|channel>thought\n"
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"


@cache
def known(name: str) -> AnswerFormat:
    return answer_format(tokenizer_of(KNOWN[name]))


def prompt(name: str, *messages: dict[str, Any], **variables: Any) -> list[int]:
    answers = known(name)
    tools = TOOLS if messages else None
    asked = [QUESTION, *messages]
    return encode_prompt(answers.tokenizer, asked, tools=tools, variables=variables, answers=answers)


def matching(name: str, ids: list[int], said: str, **options: Any) -> Any:
    """The matcher of an answer behind what was said of it; None where that is not allowed."""
    answers = known(name)
    grammar = form(options or {"json_schema": SCHEMA}, ids, answers)
    assert grammar is not None
    found = matcher(answers.tokenizer, grammar, tiny_models.VOCAB)
    for token in answers.tokenizer(said, add_special_tokens=False)["input_ids"]:
        if found.is_stopped() or not found.consume_token(token):
            return None
    return found


def accepts(name: str, ids: list[int], said: str, **options: Any) -> bool:
    found = matching(name, ids, said, **options)
    return found is not None and found.is_accepting()


def result(name: str) -> list[dict[str, Any]]:
    """A call and what came of it."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "It is five."},
    ]


@pytest.mark.parametrize(
    ("name", "thought", "variables"),
    [
        ("hybrid", "<think>\nHm, {1}.\n</think>\n\n", {}),
        ("hybrid", "<think>Hm.</think>", {"enable_thinking": True}),
        ("hybrid", "\n<think></think>\n", {}),
        ("lfm", "<think>Hm.</think>", {}),
        ("gemma", f"{GEMMAS}Hm.\n<channel|>", {"enable_thinking": True}),
        ("new gemma", f"{GEMMAS}Hm.\n<channel|>", {"enable_thinking": True}),
        ("mistral 4", "[THINK]Hm.[/THINK]", {"enable_thinking": True}),
        ("mistral 4", "[THINK]Hm.[/THINK]", {"reasoning_effort": "low"}),
    ],
)
def test_a_thought_that_the_model_is_free_to_begin(name: str, thought: str, variables: Any) -> None:
    """Behind a question, and behind what came of a call."""
    for messages in ([], result(name)):
        ids = prompt(name, *messages, **variables)
        assert accepts(name, ids, JSON)
        assert accepts(name, ids, thought + JSON)
        for wrong in (thought, f"{thought}Yes.", f"{thought}{thought}{JSON}", f"Yes.{thought}{JSON}", "Yes."):
            assert not accepts(name, ids, wrong)


@pytest.mark.parametrize("name", ["hybrid", "lfm"])
def test_calls_that_are_demanded_may_follow_a_thought(name: str) -> None:
    ids, grammar = prompt(name), known(name).grammar({"now": None})
    call = {"hybrid": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'}.get(
        name, "<|tool_call_start|>[now()]<|tool_call_end|>"
    )
    for said, right in (
        (call, True),
        (f"<think>Hm.</think>\n\n{call}", True),
        ("<think>Hm.</think>No.", False),
    ):
        assert accepts(name, ids, said, grammar=grammar) == right


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("hybrid", {"enable_thinking": False}),
        ("gemma", {}),
        ("new gemma", {}),
        ("mistral 4", {}),
        ("mistral 4", {"reasoning_effort": "none"}),
        ("telling", {}),
        ("telling", {"enable_thinking": True}),
    ],
)
def test_no_thought_is_allowed_where_it_was_turned_off(name: str, variables: Any) -> None:
    for messages in ([], result(name)):
        ids = prompt(name, *messages, **variables)
        assert known(name).leading(ids) is None
        assert accepts(name, ids, JSON)


@pytest.mark.parametrize("name", [name for name in DIALECTS if "think" not in KNOWN[name].template.lower()])
def test_no_thought_is_allowed_where_the_template_knows_of_none(name: str) -> None:
    assert known(name).leading(prompt(name)) is None


def test_no_thought_is_allowed_but_at_the_beginning_of_an_answer() -> None:
    answers = known("hybrid")
    continued = prompt("hybrid", {"role": "assistant", "content": "The answer is"})
    text = encode_prompt(answers.tokenizer, "Once upon a time", template=False)
    for ids in (continued, text, []):
        assert answers.leading(ids) is None


def test_a_thought_that_the_prompt_has_begun() -> None:
    ids = prompt("thinking")
    assert known("thinking").tokenizer.decode(ids).endswith("<think>\n")
    for said, right in ((f"Hm.</think>\n\n{JSON}", True), (f"</think>{JSON}", True), (JSON, False)):
        assert accepts("thinking", ids, said) == right
    assert not accepts("thinking", ids, f"Hm.</think>\nYes, {JSON}")
    off = prompt("thinking", enable_thinking=False)
    assert accepts("thinking", off, JSON)


@pytest.mark.parametrize("name", ["hybrid", "thinking", "harmony"])
def test_an_answer_cannot_end_within_a_thought(name: str) -> None:
    said = {"hybrid": "<think>Hm.", "thinking": "Hm.", "harmony": f"{ANALYSIS}Hm."}[name]
    found = matching(name, prompt(name), said)
    assert not found.is_accepting()
    assert not found.is_stopped()


@pytest.mark.parametrize("begun", ["", f"{ANALYSIS}Hm. {{}}<|end|><|start|>assistant"])
def test_after_an_analysis_nothing_but_the_final_message_follows(begun: str) -> None:
    ids = prompt("harmony")
    assert accepts("harmony", ids, begun + FINAL + JSON)
    assert accepts("harmony", ids, f"{begun}<|channel|>final <|constrain|>json<|message|>{JSON}")
    for wrong in (
        JSON,
        f"<|channel|>commentary<|message|>{JSON}",
        f"{FINAL}Yes: {JSON}",
        f"<|channel|>commentary to=functions.now<|message|>{JSON}",
        f"{ANALYSIS}Hm.<|return|>",
    ):
        assert not accepts("harmony", ids, begun + wrong), wrong
    for end in ("<|return|>", "<|call|>"):
        assert matching("harmony", ids, f"{ANALYSIS}Hm.{end}") is None


def test_a_message_of_a_channel_that_the_prompt_has_begun() -> None:
    tokenizer = known("harmony").tokenizer
    final = tokenizer(f"<|start|>user<|message|>Hi<|end|><|start|>assistant{FINAL}")["input_ids"]
    assert accepts("harmony", final, JSON)
    analysis = tokenizer(f"<|start|>assistant{ANALYSIS}They")["input_ids"]
    assert accepts("harmony", analysis, f" ask.<|end|><|start|>assistant{FINAL}{JSON}")
    assert not accepts("harmony", analysis, JSON)
    assert accepts("harmony", tokenizer("A text:")["input_ids"], JSON)


def test_grammars_of_ones_own_begin_behind_a_thought_unless_their_first_line_names_its_mark() -> None:
    ids = prompt("hybrid")
    for said, right in (("Yes", True), ("<think>Hm.</think>Yes", True), ("<think>Hm.</think>", False)):
        assert accepts("hybrid", ids, said, grammar='start: "Yes"') == right
    own = '// from <think> on\nstart: "Yes"'
    assert accepts("hybrid", ids, "Yes", grammar=own)
    assert not accepts("hybrid", ids, "<think>Hm.</think>Yes", grammar=own)
    with_text = 'start: "Yes"\n// no <think> here'
    assert accepts("hybrid", ids, "<think>Hm.</think>Yes", grammar=with_text)
    assert accepts("harmony", prompt("harmony"), f"{FINAL}Yes", grammar='start: "Yes"')


def test_a_grammar_that_is_wrong_is_quoted_as_it_was_given() -> None:
    with pytest.raises(ValueError, match=r"at 1\(8\): unknown name: .foo. 1 . start: foo"):
        matching("hybrid", prompt("hybrid"), "", grammar="start: foo")


def test_what_stands_behind_a_thought_is_json_alone() -> None:
    answers, ids = known("hybrid"), prompt("hybrid")
    parser = answers.parser(ids)
    pieces = [*parser.add(f"<think>\n{{}}\n</think>\n\n{JSON}"), *parser.flush()]
    assert json.loads("".join(piece.content for piece in pieces)) == {"sure": True}
    assert "".join(piece.reasoning for piece in pieces) == "\n{}\n"
