"""Answers of most models: perhaps a thought between marks, then content, with calls in their marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.offload.answer_format.answer_format import AnswerFormat, Message
from moe_local.offload.answer_format.answer_parser import AnswerParser
from moe_local.offload.answer_format.call_syntax import CallSyntax
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Parser
from moe_local.offload.thoughts import THINK, ThoughtMarks, opened_thought


class MarkedFormat(AnswerFormat):
    """The format of models that differ in their `syntax` of calls and the marks of `thoughts` only."""

    def __init__(self, tokenizer: Any, syntax: CallSyntax, thoughts: ThoughtMarks = THINK) -> None:
        marks = (thoughts.opening, thoughts.closing, *syntax.marks)
        super().__init__(tokenizer, MarkTokens(tokenizer, marks))
        self.syntax = syntax
        self.thoughts = thoughts

    def parser(
        self,
        prompt_ids: Sequence[int],
        *,
        functions: Mapping[str, Any] | None = None,
        one_call: bool = False,
    ) -> Parser:
        thinking = self.tokenizer is not None and opened_thought(self.tokenizer, prompt_ids) is not None
        return AnswerParser(
            self.syntax, functions, thoughts=self.thoughts, thinking=thinking, one_call=one_call
        )

    def grammar(self, functions: Mapping[str, Any], schema: str | None = None) -> str:
        calls = [f"call_{number}" for number in range(len(functions))]
        rules = ["start: " + " | ".join(calls + ["json"] * (schema is not None))]
        if schema is not None:
            rules.append(f"json: {schema}")
        for call, (name, parameters) in zip(calls, functions.items(), strict=True):
            rules += self.syntax.grammar_rules(name, parameters, call, self.tokens)
        return "\n".join(rules)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        shown = super().messages(messages)
        for message in shown:
            if "reasoning_content" in message:
                message[self.needs.thought_key] = message.pop("reasoning_content")
        return shown
