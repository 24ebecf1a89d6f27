"""Answers of most models: perhaps a thought between marks, then content, with calls in their marks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from moe_local.offload.answer_format.answer_format import RESULT, AnswerFormat, Message, calls_of
from moe_local.offload.answer_format.answer_parser import AnswerParser
from moe_local.offload.answer_format.call_syntax import CallSyntax, text_term
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Parser
from moe_local.offload.thoughts import THINK, ThoughtMarks, opened_thought

PROMPT_END = 64
"""Tokens of a prompt: more than any template has behind its last message."""


class MarkedFormat(AnswerFormat):
    """The format of models that differ in their `syntax` of calls and the marks of `thoughts` only."""

    def __init__(self, tokenizer: Any, syntax: CallSyntax, thoughts: ThoughtMarks = THINK) -> None:
        marks = (thoughts.opening, thoughts.closing, *syntax.marks)
        super().__init__(tokenizer, MarkTokens(tokenizer, marks))
        self.syntax = syntax
        self.thoughts = thoughts
        self.thought_mark = thoughts.opening

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

    def leading(self, prompt_ids: Sequence[int]) -> str | None:
        """A thought that the prompt has begun, or that the model is free to begin."""
        if self.tokenizer is None:
            return None
        has_begun = opened_thought(self.tokenizer, prompt_ids) is not None
        if not has_begun and not self.may_think(prompt_ids):
            return None
        text, breaks = "thought_text", r"/\n{0,2}/"  # as models have them behind a thought
        rules = [self.tokens.text_rule(text, self.thoughts.closing)]
        if has_begun:
            return "\n".join([f"start: {text} {breaks} @content", *rules])
        name = f" {text_term(self.thoughts.name)}" if self.thoughts.name else ""
        opening = self.tokens.term(self.thoughts.opening) + name
        return "\n".join([f'start: ("\\n"? {opening} {text} {breaks})? @content', *rules])

    def may_think(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the answer to a prompt may begin with a thought: one that the chat template has made, with
        thoughts not turned off, for a model that the template knows to think."""
        thinking, any_way = self._prompts_end
        end = _squeezed(self.tokenizer.decode(list(prompt_ids[-PROMPT_END:])))
        return end.endswith(thinking) or (end.endswith(any_way) and self.is_told_to_think(prompt_ids))

    def is_told_to_think(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt whose end does not tell leaves the model its thoughts."""
        return not self.needs.switches

    @cached_property
    def _prompts_end(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """How prompts end, without white space: only with thoughts on, and whether they are on or off."""
        if self.thoughts.opening not in self._template:
            return (), ()
        usual, told, untold = (
            {*self._prompt_ends(dict.fromkeys(self.needs.switches, on) if on is not None else {})}
            for on in (None, True, False)
        )
        return tuple((usual | told) - untold), tuple(told & untold)

    def _prompt_ends(self, variables: Mapping[str, Any]) -> Iterator[str]:
        """What the template, given these variables, has behind a question, and behind a call's result."""
        question = self.needs.rendered([{"role": "user", "content": RESULT}], variables=variables)
        for shown in (question, self.shown_call(variables)):
            _, found, end = (shown or "").rpartition(RESULT)
            if found:
                yield _squeezed(end)

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
            if calls_of(message) and not self.needs.shows_calls:
                message["content"] = self.syntax.written(calls_of(message)) + (message.get("content") or "")
        return shown


def _squeezed(text: str) -> str:
    """Without white space, which decoding may add or leave out beside marks."""
    return "".join(text.split())
