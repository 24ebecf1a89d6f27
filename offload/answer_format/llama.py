"""Tool calls as Llama 4 writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import NO_ARGUMENTS, CallSyntax, text_term
from moe_local.offload.answer_format.hermes import parse_calls
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call
from moe_local.offload.answer_format.python_calls import python_calls, python_rules
from moe_local.offload.forms import json_rule

PYTHON = re.compile(r"\[\s*(?:(?P<name>[A-Za-z_][\w.\-]*)\s*(?P<opened>\(.*)?)?", re.DOTALL)
JSON = re.compile(r'(?:\[\s*)?\{\s*(?:"(?P<key>[^"]*)(?P<closed>".*)?)?', re.DOTALL)
"""What calls begin like, as far as they have come."""
KEYS = ("name", "parameters", "arguments", "type")
"""Of a call in JSON."""


class Llama(CallSyntax):
    """Python, `[f(p="value"), g()]`, or JSON, `{"name": "f", "parameters": {"p": "value"}}`.

    Both are understood, whichever the template asks for. They stand alone, without marks around them: the two
    that there are only part them from words, and models leave them out.
    """

    opening, closing = "<|python_start|>", "<|python_end|>"

    def __init__(self, *, python: bool) -> None:
        """`python`: whether this model is asked for Python."""
        self._python = python

    def may_be_call(self, text: str, functions: Mapping[str, Any]) -> bool:
        """Whether text that begins with no white space may be the beginning of a call of one of them."""
        if found := PYTHON.fullmatch(text):
            name = found["name"] or ""
            return name in functions if found["opened"] else _begins_one(name, functions)
        if found := JSON.fullmatch(text):
            key = found["key"] or ""
            return key in KEYS if found["closed"] else _begins_one(key, KEYS)
        return False

    def read(self, text: str, functions: Mapping[str, Any], tried: int = 0) -> tuple[list[Call], str] | None:
        """The calls that a text begins with, and the text behind them; None: there are none yet.

        `tried`: characters of the text that were not enough. Only calls of the functions count: without
        marks, any other would be an answer in JSON.
        """
        for at in range(tried, len(text)):
            if text[at] in "]}":
                calls = self.parse(text[: at + 1], functions)
                if calls:
                    return calls, text[at + 1 :]
        return None

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        is_python = PYTHON.fullmatch(text) is not None
        calls = (python_calls(text, functions) if is_python else parse_calls(text)) or []
        return calls if all(call["name"] in functions for call in calls) else None

    def rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        if self._python:
            return python_rules(name, schema, call, '""', "")
        before = text_term(f'{{"name": {json.dumps(name)}, "parameters": ')
        return [
            f'{call}: {before} {call}_arguments "}}"',
            f"{call}_arguments: {json_rule(schema or NO_ARGUMENTS)}",
        ]


def _begins_one(text: str, words: Mapping[str, Any] | tuple[str, ...]) -> bool:
    return any(word.startswith(text) for word in words)
