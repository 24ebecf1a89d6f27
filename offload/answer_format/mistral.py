"""Tool calls as Mistral's models write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import JsonSyntax, json_call, text_term
from moe_local.offload.answer_format.hermes import parse_calls
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call

ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"
NAMED = re.compile(r"\s*([^\[{\n]+?)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\]")
"""What stands before the arguments of a newer call."""


class Mistral(JsonSyntax):
    """`[TOOL_CALLS] [{"name": "f", "arguments": {"p": "value"}}]` or `[TOOL_CALLS]f[ARGS]{"p": "value"}`.

    The latter is newer. Nothing closes them: the list, or the object, ends the call. Both are understood.
    """

    opening, closing = "[TOOL_CALLS]", ""
    inner: tuple[str, ...] = (ARGUMENTS, CALL_ID)
    list_opening = " ["

    def __init__(self, *, listed: bool) -> None:
        """`listed`: whether this model writes a list."""
        self._listed = listed

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.opening, *self.inner)

    def split(self, text: str) -> tuple[str, str] | None:
        named = NAMED.match(text)
        begin = named.end() if named else 0
        begin += len(text[begin:]) - len(text[begin:].lstrip())
        if text[begin : begin + 1] not in ("[", "{"):
            return None
        try:
            _, end = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            return None
        return text[:end], text[end:]

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        if named := NAMED.match(text):
            return json_call(named[1], text[named.end() :])
        return parse_calls(text)

    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        opening = marks.term(self.opening)
        if self._listed:
            before = text_term(f'{self.list_opening}{{"name": {json.dumps(name)}, "arguments": ')
            return [opening, before], [text_term("}]")]
        return [opening, text_term(name), marks.term(ARGUMENTS)], []
