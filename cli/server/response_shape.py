"""A response of `/v1/responses`: whole, and as the events in which it comes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_local.cli.server.answers import Answer, Choice
from moe_local.cli.server.failures import Failure
from moe_local.cli.server.logprobs import TokenNames
from moe_local.cli.server.parted_shape import PartedShape
from moe_local.offload.answer_format.piece import Piece

Event = dict[str, Any]
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponseShape(PartedShape):
    """Its parts are the items of a response's output."""

    thought, text = "reasoning", "message"

    def __init__(
        self,
        answer: Answer,
        settings: Mapping[str, Any],
        spaced: Mapping[str, tuple[str, str]],
        names: TokenNames | None,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        """`answer`: with one choice. `settings`: what the response repeats of its request. `spaced`:
        namespace and name of functions, by what the model calls them. `names`: for log probabilities; None:
        none are wanted. `keep` is given the response when it is whole."""
        super().__init__(answer)
        self._settings = settings
        self._spaced = spaced
        self._names = names
        self._keep = keep
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._logprobs: list[dict[str, Any]] = []
        """Of the message that is open..."""
        self._fresh: list[dict[str, Any]] = []
        """...and of text that is none of it yet."""
        self._taken = 0
        """Log probabilities so far, those of thoughts included."""
        self._sent = 0
        """Events so far."""

    def opening(self) -> Iterator[Event]:
        yield self._event("created", response=self._written())
        yield self._event("in_progress", response=self._written())

    def waiting(self) -> Iterator[Event]:
        yield from ()

    def delta(self, choice: Choice, piece: Piece) -> Iterator[Event]:
        self._fresh += self._scored(choice)
        if piece.call is not None or piece.reasoning:
            self._fresh = []
        yield from super().delta(choice, piece)

    def closing(self, choice: Choice) -> Iterator[Event]:
        self._status = "incomplete" if choice.reason() == "length" else "completed"
        yield from super().closing(choice)

    def ending(self) -> Iterator[Event]:
        response = self._written()
        self._keep(response)
        yield self._event(self._status, response=response)

    def failed(self, failure: Failure) -> Event:
        code = "rate_limit_exceeded" if failure.status == 429 else "server_error"
        self._status, self._error = "failed", {"code": code, "message": str(failure)}
        return self._event("failed", response=self._written())

    def _written(self) -> dict[str, Any]:
        answer = self._answer
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        ended = self._status != "in_progress"
        return {
            "id": answer.id,
            "object": "response",
            "created_at": answer.created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": cut,
            "model": answer.model,
            "output": list(self._parts),
            "usage": self._usage() if ended else None,
            **self._settings,
        }

    def _usage(self) -> dict[str, Any]:
        counted = self._answer.usage()
        details = counted["prompt_tokens_details"]
        computed = counted["prompt_tokens"] - details["cached_tokens"]
        return {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {**details, "cache_write_tokens": computed},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._answer.reasoning_tokens},
            "total_tokens": counted["total_tokens"],
        }

    # Items

    def _begin(self, kind: str) -> Iterator[Event]:
        fields: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        yield self._added(kind, content=[], **fields)
        yield self._part_event("content_part.added", part=self._part(kind, ""))

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        scores = {}
        if kind == "message":
            self._logprobs += self._fresh
            scores, self._fresh = {"logprobs": self._fresh}, []
        yield self._part_event(f"{PARTS[kind]}.delta", delta=text, **scores)

    def _end(self, kind: str, text: str) -> Iterator[Event]:
        part = self._part(kind, text)
        scores = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield self._part_event(f"{part['type']}.done", text=text, **scores)
        yield self._part_event("content_part.done", part=part)
        self._parts[-1]["content"] = [part]
        self._logprobs = []
        yield self._done("incomplete" if self._status == "incomplete" else "completed")

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        namespace, name = self._spaced.get(call["name"], (None, call["name"]))
        space = {"namespace": namespace} if namespace else {}
        yield self._added("function_call", call_id=self._answer.call_id(), name=name, arguments="", **space)
        item = self._parts[-1]
        item["arguments"] = call["arguments"]
        where = {"item_id": item["id"], "output_index": len(self._parts) - 1}
        yield self._event("function_call_arguments.delta", **where, delta=call["arguments"])
        done = {"name": name, "arguments": call["arguments"]}
        yield self._event("function_call_arguments.done", **where, **done)
        yield self._done("completed")

    def _added(self, kind: str, **fields: Any) -> Event:
        name = f"{PREFIXES[kind]}_{uuid.uuid4().hex[:24]}"
        self._parts.append({"id": name, "type": kind, "status": "in_progress", **fields})
        return self._item_event("added")

    def _done(self, status: str) -> Event:
        self._parts[-1]["status"] = status
        return self._item_event("done")

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        """What an item has as its content."""
        scores = {"annotations": [], "logprobs": self._logprobs} if kind == "message" else {}
        return {"type": PARTS[kind], "text": text, **scores}

    def _scored(self, choice: Choice) -> list[dict[str, Any]]:
        """Log probabilities of what has become text since the last time, without those of thoughts."""
        if self._names is None:
            return []
        entries = choice.entries.take()
        thoughts = max(0, choice.thoughts - self._taken)
        self._taken += len(entries)
        content: list[dict[str, Any]] = self._names.chat(entries[thoughts:])["content"]
        return content

    # Events

    def _item_event(self, kind: str) -> Event:
        where = len(self._parts) - 1
        return self._event(f"output_item.{kind}", output_index=where, item={**self._parts[-1]})

    def _part_event(self, kind: str, **fields: Any) -> Event:
        where = {"output_index": len(self._parts) - 1, "content_index": 0}
        return self._event(kind, item_id=self._parts[-1]["id"], **where, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sent += 1
        return {"type": f"response.{kind}", "sequence_number": self._sent - 1, **fields}
