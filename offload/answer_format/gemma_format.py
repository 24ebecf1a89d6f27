"""Answers of Gemma 4, whose templates want the results of calls within the message that made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_local.offload.answer_format.answer_format import Message, calls_of
from moe_local.offload.answer_format.gemma import Gemma
from moe_local.offload.answer_format.marked import MarkedFormat
from moe_local.offload.thoughts import GEMMA


class GemmaFormat(MarkedFormat):
    """The usual format but for the results of calls: a model's turn goes on behind them."""

    ends = ("<|tool_response>",)
    told = "<|think|>"
    """What a prompt with thoughts has in its system turn."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, Gemma(), GEMMA)
        self._looks_ahead = "tool_call_id" in self._template
        """Whether the template itself, as newer ones do, looks for the results behind a message."""

    def is_told_to_think(self, prompt_ids: Sequence[int]) -> bool:
        return self.told in self.tokenizer.decode(list(prompt_ids))

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = []
        for message in super().messages(messages):
            if message["role"] != "tool" or self._looks_ahead or not shown or not calls_of(shown[-1]):
                shown.append(message)
                continue
            calling = shown[-1]
            names = {call.get("id"): call["function"].get("name") for call in calls_of(calling)}
            name = names.get(message.get("tool_call_id")) or message.get("name") or "unknown"
            calling.setdefault("tool_responses", []).append({"name": name, "response": message["content"]})
        return shown
