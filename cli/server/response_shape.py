"""A response of `/v1/responses`: whole, and as the events in which it comes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_local.cli.answer_parser import Piece
from moe_local.cli.server.answers import Answer, Choice
from moe_local.cli.server.failures import Failure
from moe_local.cli.server.logprobs import TokenNames
from moe_local.cli.server.text import call_id

Event = dict[str, Any]
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponseShape:
    """Writes the items of a response's output one after the other: each is opened, grows, and is closed.

    The whole response is made by the same events, which then nobody is sent. White space is held back until a
    text follows, since otherwise the line break between two calls would be a message.
    """

    end = None

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
        self._answer = answer
        self._settings = settings
        self._spaced = spaced
        self._names = names
        self._keep = keep
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._output: list[dict[str, Any]] = []
        self._text: list[str] = []
        """Of the item that is open..."""
        self._logprobs: list[dict[str, Any]] = []
        """...and its log probabilities."""
        self._blank = ""
        self._taken = 0
        """Log probabilities so far, those of thoughts included."""
        self._sent = 0
        """Events so far."""

    def whole(self) -> dict[str, Any]:
        for choice in self._answer.choices:
            _exhaust(self.closing(choice))
        _exhaust(self.ending())
        return self._response()

    def keep(self, choice: Choice, piece: Piece) -> None:
        _exhaust(self.delta(choice, piece))

    def opening(self) -> Iterator[Event]:
        yield self._event("created", response=self._response())
        yield self._event("in_progress", response=self._response())

    def delta(self, choice: Choice, piece: Piece) -> Iterator[Event]:
        logprobs = self._scored(choice)
        if piece.call is not None:
            self._blank = ""
            yield from self._call(piece.call)
        elif piece.reasoning:
            yield from self._add("reasoning", piece.reasoning, [])
        elif self._open("message") or (self._blank + piece.content).strip():
            yield from self._add("message", self._blank + piece.content, logprobs)
            self._blank = ""
        else:
            self._blank += piece.content

    def closing(self, choice: Choice) -> Iterator[Event]:
        if not self._output:
            yield from self._add("message", self._blank, [])
        self._status = "incomplete" if choice.reason() == "length" else "completed"
        yield from self._close(self._status)

    def ending(self) -> Iterator[Event]:
        response = self._response()
        self._keep(response)
        yield self._event(self._status, response=response)

    def failed(self, failure: Failure) -> Event:
        code = "rate_limit_exceeded" if failure.status == 429 else "server_error"
        self._status, self._error = "failed", {"code": code, "message": str(failure)}
        return self._event("failed", response=self._response())

    def _response(self) -> dict[str, Any]:
        answer = self._answer
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": answer.id,
            "object": "response",
            "created_at": answer.created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": cut,
            "model": answer.model,
            "output": list(self._output),
            "usage": None if self._status == "in_progress" else self._usage(),
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

    # Items. An item is open as long as it is the last one, and in progress.

    def _open(self, kind: str) -> bool:
        last = self._output[-1] if self._output else {}
        return last.get("type") == kind and last["status"] == "in_progress"

    def _begin(self, kind: str, **fields: Any) -> Iterator[Event]:
        yield from self._close("completed")
        name = f"{PREFIXES[kind]}_{uuid.uuid4().hex[:24]}"
        self._output.append({"id": name, "type": kind, "status": "in_progress", **fields})
        yield self._event("output_item.added", output_index=len(self._output) - 1, item={**self._output[-1]})

    def _add(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if not self._open(kind):
            fields: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._begin(kind, content=[], **fields)
            yield self._part_event("content_part.added", part=self._part())
        if text:
            self._text.append(text)
            self._logprobs += logprobs
            scores = {"logprobs": logprobs} if kind == "message" else {}
            yield self._part_event(f"{PARTS[kind]}.delta", delta=text, **scores)

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        """A call, which the parser gives whole."""
        namespace, name = self._spaced.get(call["name"], (None, call["name"]))
        space = {"namespace": namespace} if namespace else {}
        yield from self._begin("function_call", call_id=call_id(), name=name, arguments="", **space)
        item = self._output[-1]
        item["arguments"] = call["arguments"]
        where = {"item_id": item["id"], "output_index": len(self._output) - 1}
        yield self._event("function_call_arguments.delta", **where, delta=call["arguments"])
        done = {"name": name, "arguments": call["arguments"]}
        yield self._event("function_call_arguments.done", **where, **done)
        yield from self._close("completed")

    def _close(self, status: str) -> Iterator[Event]:
        """Ends the item that is open, if one is."""
        item = self._output[-1] if self._output else {}
        if item.get("status") != "in_progress":
            return
        if item["type"] != "function_call":
            part = self._part()
            scores = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._part_event(f"{part['type']}.done", text=part["text"], **scores)
            yield self._part_event("content_part.done", part=part)
            item["content"] = [part]
            self._text, self._logprobs = [], []
        item["status"] = status
        yield self._event("output_item.done", output_index=len(self._output) - 1, item={**item})

    def _part(self) -> dict[str, Any]:
        """The text of the item that is open, so far."""
        text = "".join(self._text)
        kind = self._output[-1]["type"]
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

    def _part_event(self, kind: str, **fields: Any) -> Event:
        where = {"output_index": len(self._output) - 1, "content_index": 0}
        return self._event(kind, item_id=self._output[-1]["id"], **where, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sent += 1
        return {"type": f"response.{kind}", "sequence_number": self._sent - 1, **fields}


def _exhaust(events: Iterator[Event]) -> None:
    for _ in events:
        pass
