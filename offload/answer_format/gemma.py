"""Tool calls as Gemma 4 writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from moe_local.cache.files import parse_json
from moe_local.offload.answer_format.call_syntax import CallSyntax, json_call, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.notation import Notation, ValueRules
from moe_local.offload.answer_format.piece import Call
from moe_local.offload.answer_format.schema import Schema

QUOTE = '<|"|>'
NAME = re.compile(r"\s*call:\s*([^\s{}]+)\s*")
TOKEN = re.compile(
    r'<\|"\|>(?P<text>.*?)<\|"\|>|(?P<json>"(?:[^"\\]|\\.)*")|(?P<sign>[{}\[\]:,])|(?P<word>[^{}\[\]:,"<]+)',
    re.DOTALL,
)
WORDS = {"None": "null", "True": "true", "False": "false"}
"""As templates of Python write them."""


class Gemma(CallSyntax):
    """`<|tool_call>call:f{days:3,place:{city:<|"|>Graz<|"|>}}<tool_call|>`

    Keys and strings with quotes of JSON, and strings without any, are understood, too.
    """

    opening, closing = "<|tool_call>", "<tool_call|>"
    inner = (QUOTE,)
    ends_thought = True

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        name = NAME.match(text)
        arguments = _as_json(text[name.end() :]) if name else None
        return json_call(name[1], arguments) if name and arguments else None

    def rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        text = f"{call}_text"
        notation = GemmaNotation(marks, text)
        values = ValueRules(notation, schema, call)
        names = sorted(Schema(schema).properties(schema), key=str.lower)  # as templates have them
        members = values.arguments({name: notation.key(name) for name in names}, notation.key(None))
        opening, closing = marks.term(self.opening), marks.term(self.closing)
        before = text_term(f"call:{name}{{")
        rule = f'{call}: {opening} {before} {members} "}}" {closing}'
        return [rule, *values.rules, marks.text_rule(text, QUOTE)]


class GemmaNotation(Notation):
    """JSON without quotes of keys, and with a mark for those of strings."""

    null = '("null" | "None")'

    def __init__(self, marks: MarkTokens, text: str) -> None:
        """`text`: the rule of any text with the mark behind it."""
        self._quote = marks.term(QUOTE)
        self.string = f"{self._quote} {text}"

    def quoted(self, text: str) -> str:
        return f"{self._quote} {text_term(text)} {self._quote}" if text else f"{self._quote} {self._quote}"

    def key(self, name: str | None) -> str:
        return '/[A-Za-z_][A-Za-z0-9_.\\-]*/ ":"' if name is None else text_term(f"{name}:")


def _as_json(text: str) -> str | None:
    """The object that a text means, as JSON; None if it is none."""
    said, at = [], 0
    for token in TOKEN.finditer(text):
        if token.start() != at:
            return None
        at = token.end()
        word = (token["word"] or "").strip()
        is_key = text[at : at + 1] == ":"
        if token["text"] is not None:
            said.append(json.dumps(token["text"], ensure_ascii=False))
        elif word:
            said.append(json.dumps(word, ensure_ascii=False) if is_key else _bare(word))
        else:
            said.append(token["json"] or token["sign"] or "")
    found = "".join(said)
    if found.startswith("{{") and found.endswith("}}"):  # as after arguments that were shown as JSON
        found = found[1:-1]
    return found if at == len(text) and found.startswith("{") else None


def _bare(word: str) -> str:
    """A value without quotes as JSON."""
    try:
        return json.dumps(parse_json(WORDS.get(word, word)), allow_nan=False)
    except ValueError:
        return json.dumps(word, ensure_ascii=False)
