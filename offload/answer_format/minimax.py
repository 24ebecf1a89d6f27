"""Tool calls as MiniMax-M2 writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import TaggedSyntax, tagged_call, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call

NAME = re.compile(r'"([^"\n]+)">')
PARAMETER = re.compile(r'\s*<parameter name="([^"\n]+)">(.*?)</parameter>\s*', re.DOTALL)


class MiniMax(TaggedSyntax):
    """In `<minimax:tool_call>`, `<invoke name="f">\\n<parameter name="p">value</parameter>\\n</invoke>`."""

    section = ("<minimax:tool_call>", "</minimax:tool_call>")
    opening, closing = "<invoke name=", "</invoke>"

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        name = NAME.match(text)
        if name is None:
            return None
        said = text[name.end() :]
        if PARAMETER.sub("", said).strip():
            return None
        return tagged_call(name[1], PARAMETER.findall(said), functions)

    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        return [text_term(f'\n{self.opening}"{name}">\n')], [text_term(f"{self.closing}\n")]

    def tags(self, parameter: str, marks: MarkTokens, *, is_text: bool) -> tuple[list[str], str, str]:
        return [text_term(f'<parameter name="{parameter}">')], "</parameter>", "\n"
