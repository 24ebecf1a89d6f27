"""Answers of LFM2, whose first templates show none of a conversation's calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_local.offload.answer_format.answer_format import Message, calls_of
from moe_local.offload.answer_format.lfm import Lfm
from moe_local.offload.answer_format.marked import MarkedFormat

TOOLS = "<|tool_list_start|>"
"""In front of the tools in those templates."""


class LfmFormat(MarkedFormat):
    """The usual format, with calls as text where the template leaves them out."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, Lfm())

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        shown = super().messages(messages)
        if Lfm.opening not in self._template:
            for message in shown:
                if calls := calls_of(message):
                    message["content"] = Lfm().written(calls) + (message.get("content") or "")
        return shown
