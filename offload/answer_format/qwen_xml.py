"""Tool calls as Qwen3-Coder and Qwen3.5 write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import TaggedSyntax, tagged_call, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Call

CALL = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


class QwenXml(TaggedSyntax):
    """`<tool_call>\\n<function=f>\\n<parameter=p>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>`

    Qwen3-Coder at times leaves out the opening mark, mostly behind words of its own.
    """

    opening, closing = "<tool_call>", "</tool_call>"
    bare = "<function="

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        call = CALL.fullmatch(text)
        if call is None:
            return None
        arguments = PARAMETER.findall(call[2])
        if PARAMETER.sub("", call[2]).strip():
            return None
        return tagged_call(call[1].strip(), arguments, functions)

    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        before = [marks.term(self.opening), text_term(f"\n<function={name}>\n")]
        return before, [text_term("</function>\n"), marks.term(self.closing)]

    def tags(self, parameter: str, marks: MarkTokens, *, is_text: bool) -> tuple[list[str], str, str]:
        return [text_term(f"<parameter={parameter}>\n")], "\n</parameter>\n", ""
