"""Tool calls as Hermes, Qwen3 and many others write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_local.cache.files import parse_json
from moe_local.offload.answer_format.call_syntax import JsonSyntax, checked_call, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call


class Hermes(JsonSyntax):
    """`<tool_call>{"name": "f", "arguments": {"p": "value"}}</tool_call>`"""

    opening, closing = "<tool_call>", "</tool_call>"

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        try:
            call = parse_call(parse_json(text))
        except ValueError:
            return None
        return [call] if call else None

    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        before = text_term(f'\n{{"name": {json.dumps(name)}, "arguments": ')
        return [marks.term(self.opening), before], [text_term("}\n"), marks.term(self.closing)]


def parse_call(said: Any) -> Call | None:
    """The call that an object of JSON means; None for others."""
    if not isinstance(said, dict):
        return None
    arguments = said.get("arguments", said.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return checked_call(said.get("name"), arguments)


def parse_calls(text: str) -> list[Call] | None:
    """The calls that JSON means, a list of them or one; None if any of them is none."""
    try:
        said = parse_json(text)
    except ValueError:
        return None
    found = [parse_call(call) for call in (said if isinstance(said, list) else [said])]
    calls = [call for call in found if call]
    return calls if calls and len(calls) == len(found) else None
