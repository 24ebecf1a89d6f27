"""Tool calls as DeepSeek's V3.2 and V4 write them, in what they call DSML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import TaggedSyntax, checked_call, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.parameters import Parameters
from moe_local.offload.answer_format.piece import Call

DSML = "｜DSML｜"
NAME = re.compile(r'"([^"\n]+)">')
PARAMETER = re.compile(
    rf'\s*<{DSML}parameter name="([^"\n]+)" string="(true|false)">(.*?)</{DSML}parameter>\s*', re.DOTALL
)


class Dsml(TaggedSyntax):
    """In a block, `function_calls` in V3.2 and `tool_calls` in V4, with ｜DSML｜ behind each opening bracket:

    `<invoke name="f">\\n<parameter name="p" string="true">value</parameter>\\n</invoke>`
    """

    opening, closing = f"<{DSML}invoke name=", f"</{DSML}invoke>"
    inner = (DSML,)

    def __init__(self, block: str) -> None:
        """`block`: its name."""
        self.section = (f"<{DSML}{block}>", f"</{DSML}{block}>")

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        name = NAME.match(text)
        if name is None:
            return None
        said = text[name.end() :]
        if PARAMETER.sub("", said).strip():
            return None
        known = Parameters(functions.get(name[1]))
        values = {
            parameter: value if is_text == "true" else known.value(parameter, value)
            for parameter, is_text, value in PARAMETER.findall(said)
        }
        call = checked_call(name[1], json.dumps(values, ensure_ascii=False))
        return [call] if call else None

    def grammar_rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        block, *rules = super().grammar_rules(name, schema, call, marks)
        return [block.replace(": ", r': "\n\n"? ', 1), *rules]  # which models put in front of it

    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        opening = [text_term("\n"), marks.term(self.opening), text_term(f'"{name}">\n')]
        return opening, [marks.term(self.closing), text_term("\n")]

    def tags(self, parameter: str, marks: MarkTokens, *, is_text: bool) -> tuple[list[str], str, str]:
        said = f' name="{parameter}" string="{"true" if is_text else "false"}">'
        return [marks.term(f"<{DSML}parameter"), text_term(said)], f"</{DSML}parameter>", "\n"
