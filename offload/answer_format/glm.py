"""Tool calls as GLM-4.5 and its successors write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import TaggedSyntax, tagged_call, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call

NAME = re.compile(r"\s*([^<\n]+?)\s*(?=<arg_key>|\Z)")
ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


class Glm(TaggedSyntax):
    """`<tool_call>f\\n<arg_key>p</arg_key>\\n<arg_value>value</arg_value>\\n</tool_call>`

    From GLM-4.7 on without the line breaks; both are understood.
    """

    opening, closing = "<tool_call>", "</tool_call>"
    inner = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def __init__(self, *, breaks: bool) -> None:
        """`breaks`: whether calls of this model have line breaks."""
        self._break = "\n" if breaks else ""

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        name = NAME.match(text)
        if name is None:
            return None
        said = text[name.end() :]
        if ARGUMENT.sub("", said).strip():
            return None
        arguments = [(key.strip(), value) for key, value in ARGUMENT.findall(said)]
        return tagged_call(name[1], arguments, functions)

    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        return [marks.term(self.opening), text_term(name + self._break)], [marks.term(self.closing)]

    def tags(self, parameter: str, marks: MarkTokens, *, is_text: bool) -> tuple[list[str], str, str]:
        key, key_end, value, value_end = self.inner
        between = [text_term(self._break)] if self._break else []
        opening = [marks.term(key), text_term(parameter), marks.term(key_end), *between, marks.term(value)]
        return opening, value_end, self._break
