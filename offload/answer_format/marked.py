"""Answers of most models: perhaps a thought in `<think>` marks, then content, with calls in their marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.answer_parser import AnswerParser
from moe_local.offload.answer_format.call_syntax import CallSyntax
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Parser
from moe_local.offload.thoughts import CLOSE_THOUGHT, OPEN_THOUGHT, opens_thought


class MarkedFormat(AnswerFormat):
    """The format of models that differ in their `syntax` of calls only."""

    def __init__(self, tokenizer: Any, syntax: CallSyntax) -> None:
        super().__init__(tokenizer, MarkTokens(tokenizer, (OPEN_THOUGHT, CLOSE_THOUGHT, *syntax.marks)))
        self.syntax = syntax

    def parser(
        self,
        prompt_ids: Sequence[int],
        *,
        functions: Mapping[str, Any] | None = None,
        one_call: bool = False,
    ) -> Parser:
        thinking = self.tokenizer is not None and opens_thought(self.tokenizer, prompt_ids)
        return AnswerParser(self.syntax, functions, thinking=thinking, one_call=one_call)

    def grammar(self, functions: Mapping[str, Any], schema: str | None = None) -> str:
        calls = [f"call_{number}" for number in range(len(functions))]
        rules = ["start: " + " | ".join(calls + ["json"] * (schema is not None))]
        if schema is not None:
            rules.append(f"json: {schema}")
        for call, (name, parameters) in zip(calls, functions.items(), strict=True):
            rules += self.syntax.grammar_rules(name, parameters, call, self.tokens)
        return "\n".join(rules)
