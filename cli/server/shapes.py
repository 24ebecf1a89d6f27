"""OpenAI's response objects: whole, and chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from moe_local.cli.answer_parser import Piece
from moe_local.cli.server.answers import Answer, Choice, tool_call
from moe_local.cli.server.logprobs import TokenNames


class Shape(Protocol):
    """How one kind of answer is written."""

    def whole(self) -> dict[str, Any]:
        """The response, after everything has ended."""

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first token."""

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """The chunk of one piece."""

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The last chunk of a choice, which says why it ended."""

    def usage(self) -> dict[str, Any]:
        """The chunk that counts tokens, behind all others."""


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, answer: Answer, names: TokenNames | None = None) -> None:
        """`names`: for log probabilities; None: none are wanted."""
        self._answer = answer
        self._names = names

    def whole(self) -> dict[str, Any]:
        return {
            **_head(self._answer, "chat.completion"),
            "choices": [self._choice(choice) for choice in self._answer.choices],
            "usage": self._answer.usage(),
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        for choice in self._answer.choices:
            yield self._chunk(choice, {"role": "assistant", "content": ""})

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        if piece.call is not None:
            call = {"index": choice.calls, **tool_call(piece.call)}
            return self._chunk(choice, {"tool_calls": [call]})
        if piece.reasoning:
            return self._chunk(choice, {"reasoning_content": piece.reasoning})
        return self._chunk(choice, {"content": piece.content})

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk(choice, {}, choice.reason())

    def usage(self) -> dict[str, Any]:
        head = _head(self._answer, "chat.completion.chunk")
        return {**head, "choices": [], "usage": self._answer.usage()}

    def _chunk(self, choice: Choice, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        part = {
            "index": choice.index,
            "delta": delta,
            "finish_reason": reason,
            "logprobs": self._logprobs(choice),
        }
        return {**_head(self._answer, "chat.completion.chunk"), "choices": [part]}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        content = "".join(choice.content)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.tool_calls:
            message["tool_calls"] = choice.tool_calls
            message["content"] = content or None
        return {
            "index": choice.index,
            "message": message,
            "finish_reason": choice.reason(),
            "logprobs": self._logprobs(choice),
        }

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Of the tokens that have become text since the last time."""
        return None if self._names is None else self._names.chat(choice.entries.take())


class TextShape:
    """text_completion, whole and in chunks."""

    def __init__(self, answer: Answer, names: TokenNames | None = None) -> None:
        """`names`: for log probabilities; None: none are wanted."""
        self._answer = answer
        self._names = names

    def whole(self) -> dict[str, Any]:
        choices = [
            self._part(choice, self._prefix(choice) + "".join(choice.content), choice.reason())
            for choice in self._answer.choices
        ]
        head = _head(self._answer, "text_completion")
        return {**head, "choices": choices, "usage": self._answer.usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        for choice in self._answer.choices:
            if self._prefix(choice):
                yield self._chunk(choice, self._prefix(choice))

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return self._chunk(choice, piece.content)

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk(choice, "", choice.reason())

    def usage(self) -> dict[str, Any]:
        head = _head(self._answer, "text_completion")
        return {**head, "choices": [], "usage": self._answer.usage()}

    def _prefix(self, choice: Choice) -> str:
        return "" if choice.echo is None else choice.echo.text

    def _chunk(self, choice: Choice, text: str, reason: str | None = None) -> dict[str, Any]:
        return {**_head(self._answer, "text_completion"), "choices": [self._part(choice, text, reason)]}

    def _part(self, choice: Choice, text: str, reason: str | None) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "finish_reason": reason,
            "logprobs": self._logprobs(choice),
        }

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self._names is None:
            return None
        return self._names.completion(choice.entries.take())


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}
