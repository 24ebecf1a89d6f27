"""Answers of gpt-oss, in OpenAI's harmony format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.offload.answer_format.answer_format import AnswerFormat, Message, calls_of
from moe_local.offload.answer_format.call_syntax import NO_ARGUMENTS, text_term
from moe_local.offload.answer_format.harmony_parser import (
    ASSISTANT,
    CALL,
    CONSTRAIN,
    END,
    FUNCTIONS,
    RETURN,
    HarmonyParser,
)
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Parser
from moe_local.offload.forms import json_rule
from moe_local.offload.thoughts import CHANNEL, LATEST, MESSAGE, START

THOUGHT = "thought"
"""The rule of an analysis."""
HEADER_TOKENS = 64
"""More than any header has, tokenized however."""


class HarmonyFormat(AnswerFormat):
    """Messages in channels; thoughts, content and calls are told apart by their headers."""

    ends, part_ends = (RETURN, CALL), (END,)
    thought_mark = CHANNEL

    def __init__(self, tokenizer: Any) -> None:
        marks = (CHANNEL, START, MESSAGE, END, CALL, RETURN, CONSTRAIN)
        super().__init__(tokenizer, MarkTokens(tokenizer, marks))

    def parser(
        self,
        prompt_ids: Sequence[int],
        *,
        functions: Mapping[str, Any] | None = None,
        one_call: bool = False,
    ) -> Parser:
        return HarmonyParser(self._begun(prompt_ids), functions, one_call=one_call)

    def _begun(self, prompt_ids: Sequence[int]) -> str:
        """What a prompt has of its last message, without the message's text."""
        ids, start = list(prompt_ids), self.tokens.ids.get(START)
        if start not in ids:
            return ASSISTANT
        at = len(ids) - 1 - ids[::-1].index(start)
        text: str = self.tokenizer.decode(ids[at + 1 : at + HEADER_TOKENS])
        header, begun, _ = text.partition(MESSAGE)
        return header + begun

    def leading(self, prompt_ids: Sequence[int]) -> str | None:
        """Perhaps an analysis, and the header of the final message."""
        begun = self._begun(prompt_ids)
        header, has_text, _ = begun.partition(MESSAGE)
        thinks = "analysis" in header.partition(CHANNEL)[2]
        if (has_text and not thinks) or not (has_text or self._begins_message(prompt_ids)):
            return None
        before = f"{THOUGHT}_text" if has_text else f"{THOUGHT}?"
        return "\n".join([f"start: {before} final @content", *self._channel_rules()])

    def _begins_message(self, prompt_ids: Sequence[int]) -> bool:
        end: str = self.tokenizer.decode(list(prompt_ids[-LATEST:]))
        return end.endswith(START + ASSISTANT)

    def _channel_rules(self) -> list[str]:
        """Lark of an analysis up to the next message, and of the header of the final one."""
        channel, message, end, start, constrain = map(
            self.tokens.term, (CHANNEL, MESSAGE, END, START, CONSTRAIN)
        )
        return [
            f'{THOUGHT}: {channel} "analysis" {message} {THOUGHT}_text',
            f'{THOUGHT}_text: /(?s:.*)/ {end} {start} "{ASSISTANT}"',
            f'json_next: " "? {constrain} "json" | " json"',
            f'final: {channel} "final" json_next? {message}',
        ]

    def grammar(self, functions: Mapping[str, Any], schema: str | None = None) -> str:
        """Of all of the answer, not only of its last message, since a call has a header of its own: that its
        first line names CHANNEL says so."""
        channel, message = map(self.tokens.term, (CHANNEL, MESSAGE))
        calls = [f"call_{number}" for number in range(len(functions))]
        rules = [
            f"// from {CHANNEL} on",
            f"start: {THOUGHT}? ({' | '.join(calls + ['json'] * (schema is not None))})",
            *self._channel_rules(),
        ]
        if schema is not None:
            rules += ["json: final schema", f"schema: {schema}"]
        for call, (name, parameters) in zip(calls, functions.items(), strict=True):
            to = text_term(f" to={FUNCTIONS}{name}")
            rules += [
                f'{call}: ({channel} "commentary" {to} | {to} {channel} "commentary") json_next? {message} '
                f"{call}_arguments",
                f"{call}_arguments: {json_rule(parameters or NO_ARGUMENTS)}",
            ]
        return "\n".join(rules)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Thoughts are `thinking` there, and go with calls only: of a message without one, the template would
        take the content for the thought. A message may have one call, which its result has to follow."""
        shown: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []
        for message in super().messages(messages):
            if message["role"] == "tool" and waiting:
                shown += _next_call(waiting, message.get("tool_call_id"))
                shown.append(message)
                continue
            shown += waiting
            waiting = []
            thought = message.pop("reasoning_content", None)
            calls = calls_of(message)
            if not calls:
                shown.append(message)
                continue
            # The template refuses a thought beside words for the user, and takes the latter for a thought.
            parts = [part for part in (thought, message.get("content")) if isinstance(part, str) and part]
            waiting = [{**message, "content": "", "tool_calls": [call]} for call in calls]
            if parts:
                waiting[0]["thinking"] = "\n\n".join(parts)
        return shown + waiting


def _next_call(waiting: list[dict[str, Any]], wanted: Any) -> list[dict[str, Any]]:
    """The message with the call of this id, or else the first one, taken out of those that wait."""
    ids = [message["tool_calls"][0].get("id") for message in waiting]
    return [waiting.pop(ids.index(wanted) if wanted in ids else 0)]
