"""Tool calls as DeepSeek's V3, R1 and V3.1 write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import JsonSyntax, json_call, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call

SEPARATOR = "<｜tool▁sep｜>"
FENCED = re.compile(r"\s*([^\n]+)\n```json\n(.*)\n?```\s*", re.DOTALL)


class DeepSeek(JsonSyntax):
    """Between marks of their own, `f<｜tool▁sep｜>{"p": "value"}`, as V3.1 has it.

    V3 and R1 write `function<｜tool▁sep｜>f`, and the arguments in a fence of Markdown; both are understood.
    """

    section = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    opening, closing = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    inner = (SEPARATOR,)

    def __init__(self, *, fenced: bool) -> None:
        """`fenced`: whether this model writes a fence."""
        self._fenced = fenced

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        name, separator, arguments = text.partition(SEPARATOR)
        if not separator:
            return None
        fenced = FENCED.fullmatch(arguments)
        return json_call(fenced[1], fenced[2]) if fenced else json_call(name, arguments)

    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        opening, separator, closing = map(marks.term, (self.opening, SEPARATOR, self.closing))
        if self._fenced:
            before = [opening, text_term("function"), separator, text_term(f"{name}\n```json\n")]
            return before, [text_term("\n```"), closing]
        return [opening, text_term(name), separator], [closing]
