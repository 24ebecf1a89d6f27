"""Tool calls as Kimi K2 writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import JsonSyntax, json_call, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call

ARGUMENTS = "<|tool_call_argument_begin|>"
NAME = re.compile(r"\s*(?:functions\.)?(.+?):\d+\s*")


class Kimi(JsonSyntax):
    """Between marks of their own, `functions.f:0<|tool_call_argument_begin|>{"p": "value"}`.

    The number counts the calls of a conversation.
    """

    section = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
    opening, closing = "<|tool_call_begin|>", "<|tool_call_end|>"
    inner = (ARGUMENTS,)
    ends_thought = True

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        name, separator, arguments = text.partition(ARGUMENTS)
        found = NAME.fullmatch(name)
        return json_call(found[1], arguments) if separator and found else None

    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        opening, arguments, closing = map(marks.term, (self.opening, ARGUMENTS, self.closing))
        return [opening, text_term(f"functions.{name}:"), "/[0-9]{1,3}/", arguments], [closing]
