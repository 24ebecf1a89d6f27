"""A message of `/v1/messages`: whole, and as the events in which it comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moe_local.cache.files import parse_json
from moe_local.cli.server.answers import Answer, Choice
from moe_local.cli.server.failures import MESSAGES, Failure
from moe_local.cli.server.parted_shape import PartedShape

Event = dict[str, Any]
REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
"""By OpenAI's words."""


class MessageShape(PartedShape):
    """Its parts are the blocks of a message's content."""

    thought, text = "thinking", "text"

    def __init__(self, answer: Answer) -> None:
        """`answer`: with one choice."""
        super().__init__(answer)
        self._ended: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def opening(self) -> Iterator[Event]:
        yield {"type": "message_start", "message": self._written()}
        yield from self.waiting()

    def waiting(self) -> Iterator[Event]:
        yield {"type": "ping"}

    def closing(self, choice: Choice) -> Iterator[Event]:
        yield from super().closing(choice)
        stop = choice.stops.stop
        reason = REASONS.get(choice.reason(), "end_turn") if stop is None else "stop_sequence"
        if choice.filled_context:
            reason = "model_context_window_exceeded"
        self._ended = {"stop_reason": reason, "stop_sequence": stop}

    def ending(self) -> Iterator[Event]:
        yield {"type": "message_delta", "delta": self._ended, "usage": self._usage()}
        yield {"type": "message_stop"}

    def failed(self, failure: Failure) -> Event:
        return failure.body(MESSAGES)

    def _written(self) -> dict[str, Any]:
        return {
            "id": self._answer.id,
            "type": "message",
            "role": "assistant",
            "model": self._answer.model,
            "content": list(self._parts),
            **self._ended,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """What was cached is known at the end, and counted apart. All else is kept without being asked for,
        so nothing counts as written to a cache."""
        counted = self._answer.usage()
        cached = counted["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counted["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": self._answer.reasoning_tokens},
        }

    def _begin(self, kind: str) -> Iterator[Event]:
        signature = {"signature": ""} if kind == "thinking" else {}
        yield self._started({"type": kind, kind: "", **signature})

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        yield self._delta(f"{kind}_delta", {kind: text})

    def _end(self, kind: str, text: str) -> Iterator[Event]:
        self._parts[-1][kind] = text
        if kind == "thinking":  # clients drop a thought that has none; here any will do
            self._parts[-1]["signature"] = self._answer.id
            yield self._delta("signature_delta", {"signature": self._answer.id})
        yield self._event("stop")

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        given, text = _input(call["arguments"])
        yield self._started(
            {"type": "tool_use", "id": self._answer.call_id(), "name": call["name"], "input": {}}
        )
        self._parts[-1]["input"] = given
        yield self._delta("input_json_delta", {"partial_json": text})
        yield self._event("stop")

    def _started(self, block: dict[str, Any]) -> Event:
        self._parts.append(block)
        return self._event("start", content_block={**block})

    def _delta(self, kind: str, fields: dict[str, str]) -> Event:
        return self._event("delta", delta={"type": kind, **fields})

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"content_block_{kind}", "index": len(self._parts) - 1, **fields}


def _input(arguments: str) -> tuple[dict[str, Any], str]:
    """What a call gives, and the same as JSON; nothing if the model gave no object, or NaN in one."""
    try:
        given = parse_json(arguments)
        text = json.dumps(given, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return {}, "{}"
    return (given, text) if isinstance(given, dict) else ({}, "{}")
