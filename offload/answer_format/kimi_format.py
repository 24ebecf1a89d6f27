"""Answers of Kimi K2, whose template shows the ids of earlier calls: the model goes by the names in them."""

from __future__ import annotations

from collections.abc import Sequence

from moe_local.offload.answer_format.answer_format import Message, calls_of
from moe_local.offload.answer_format.marked import MarkedFormat


class KimiFormat(MarkedFormat):
    """The usual format but for the ids."""

    def call_ids(self, messages: Sequence[Message]) -> dict[str, str]:
        """`functions.f:0`, the number being the call's in the conversation, as the model was trained."""
        calls = [call for message in messages for call in calls_of(message)]
        return {
            call["id"]: f"functions.{call['function'].get('name')}:{number}"
            for number, call in enumerate(calls)
            if isinstance(call.get("id"), str)
        }
