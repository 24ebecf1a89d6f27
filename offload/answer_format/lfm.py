"""Tool calls as LFM2 and its successors write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from moe_local.cache.files import parse_json
from moe_local.offload.answer_format.call_syntax import CallSyntax
from moe_local.offload.answer_format.hermes import parse_calls
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call
from moe_local.offload.answer_format.python_calls import python_calls, python_rules

TOOLS = "<|tool_list_start|>"
"""In front of the tools in the first templates, which show none of a conversation's calls."""


class Lfm(CallSyntax):
    """Python: `<|tool_call_start|>[f(place='Graz', days=3), g()]<|tool_call_end|>`

    A JSON list of calls, which a model may be told to write, is understood, too.
    """

    opening, closing = "<|tool_call_start|>", "<|tool_call_end|>"

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        return python_calls(text, functions) or parse_calls(text)

    def rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        return python_rules(name, schema, call, marks.term(self.opening), marks.term(self.closing))

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return f"{self.opening}[{', '.join(map(_written, calls))}]{self.closing}"


def _written(call: Mapping[str, Any]) -> str:
    function = call["function"]
    given = function.get("arguments") or {}
    if isinstance(given, str):
        with suppress(ValueError):
            given = parse_json(given)
    if not isinstance(given, Mapping):
        return f"{function.get('name')}({given})"
    return f"{function.get('name')}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
