"""Thoughts and tool calls, wherever the pieces of an answer are cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moe_local.offload.answer_format.answer_parser import AnswerParser
from moe_local.offload.answer_format.hermes import Hermes
from moe_local.offload.answer_format.piece import Piece

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call>'
ANSWERS = {
    "plain": ("Hello, world.", [Piece(content="Hello, world.")]),
    "thought": (
        "\n<think>\nHm.\n</think>\n\nYes.",
        [Piece(reasoning="\nHm.\n"), Piece(content="Yes.")],
    ),
    "call": (
        f"Let me look. {CALL}",
        [
            Piece(content="Let me look. "),
            Piece(call={"name": "weather", "arguments": '{"city": "Graz"}'}),
        ],
    ),
    "thought and calls": (
        f"<think>a < b</think>{CALL}{CALL}",
        [
            Piece(reasoning="a < b"),
            *[Piece(call={"name": "weather", "arguments": '{"city": "Graz"}'})] * 2,
        ],
    ),
    "no call": (
        "<tool_call>not JSON</tool_call> and more",
        [Piece(content="<tool_call>not JSON</tool_call> and more")],
    ),
    "unfinished": ('Look: <tool_call>{"name"', [Piece(content='Look: <tool_call>{"name"')]),
    "only the beginning of a mark": ("1 <t", [Piece(content="1 <t")]),
    "a thought later is none": ("So <think> is a tag", [Piece(content="So <think> is a tag")]),
    "an endless thought": ("<think>and on and on", [Piece(reasoning="and on and on")]),
    "nothing": ("", []),
}


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of the same kind as one."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if last and piece.content and last.content:
            result[-1] = Piece(content=last.content + piece.content)
        elif last and piece.reasoning and last.reasoning:
            result[-1] = Piece(reasoning=last.reasoning + piece.reasoning)
        else:
            result.append(piece)
    return result


def parsed(text: str) -> Any:
    """The only call in a text, or None."""
    calls = Hermes().parse(text, {})
    assert calls is None or len(calls) == 1
    return calls and calls[0]


@given(name=st.sampled_from(sorted(ANSWERS)), places=st.lists(st.integers(0, 200), max_size=12))
def test_an_answer_is_the_same_wherever_it_is_cut(name: str, places: list[int]) -> None:
    text, expected = ANSWERS[name]
    parser = AnswerParser(Hermes(), {})
    pieces = [piece for part in cut(text, places) for piece in parser.add(part)]
    assert joined([*pieces, *parser.flush()]) == expected


def test_a_prompt_that_opened_the_thought() -> None:
    parser = AnswerParser(thinking=True)
    pieces = [*parser.add("Hm.</think>"), *parser.add("\n\nYes."), *parser.flush()]
    assert pieces == [Piece(reasoning="Hm."), Piece(content="Yes.")]


def test_without_tools_a_call_is_text_and_plain_knows_no_marks() -> None:
    for parser, text in ((AnswerParser(), CALL), (AnswerParser(plain=True), f"<think>{CALL}")):
        assert joined([*parser.add(text), *parser.flush()]) == [Piece(content=text)]


@given(places=st.lists(st.integers(0, 200), max_size=12))
def test_nothing_follows_the_only_call(places: list[int]) -> None:
    parser = AnswerParser(Hermes(), {}, one_call=True)
    text = f"<tool_call>none</tool_call>{CALL}\n{CALL} And?"
    pieces = [piece for part in cut(text, places) for piece in parser.add(part)]
    expected = [Piece(content="<tool_call>none</tool_call>"), Piece(call=parsed(CALL[11:-12]))]
    assert joined([*pieces, *parser.flush()]) == expected
    assert parser.done


def test_content_comes_at_once() -> None:
    parser = AnswerParser(Hermes(), {})
    assert list(parser.add("Hel")) == [Piece(content="Hel")]
    assert list(parser.add("lo <")) == [Piece(content="lo ")]
    assert list(parser.add("3")) == [Piece(content="<3")]


@given(places=st.lists(st.integers(0, 200)))
def test_line_breaks_between_calls_are_no_content(places: list[int]) -> None:
    call = Piece(call={"name": "weather", "arguments": '{"city": "Graz"}'})

    def read(text: str) -> list[Piece]:
        parser = AnswerParser(Hermes(), {"weather": None})
        return joined([*(p for part in cut(text, places) for p in parser.add(part)), *parser.flush()])

    assert read(f"\n{CALL}\n{CALL}\n") == [call, call]
    assert read(f"Two:\n{CALL}\n{CALL}\nThere.") == [
        Piece(content="Two:\n"),
        call,
        call,
        Piece(content="\nThere."),
    ]
    assert read(" \n") == [Piece(content=" \n")]


def test_calls() -> None:
    assert parsed('{"name": "f"}') == {"name": "f", "arguments": "{}"}
    assert parsed('{"name": "f", "parameters": {"a": "ü"}}') == {"name": "f", "arguments": '{"a": "ü"}'}
    assert parsed(json.dumps({"name": "f", "arguments": '{"a": 1}'})) == {
        "name": "f",
        "arguments": '{"a": 1}',
    }
    for none in ("", "[1]", '{"name": 3}', '{"arguments": {}}', "{", "[" * 100_000):
        assert parsed(none) is None
    for half in ({"name": "\ud800"}, {"name": "f", "arguments": {"a": "\ud800"}}):
        assert parsed(json.dumps(half)) is None, "half a character, which no answer could bring to a client"
