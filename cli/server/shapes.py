"""OpenAI's response objects: whole, and chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from moe_local.cli.server.answers import Answer, Choice
from moe_local.cli.server.failures import Failure
from moe_local.cli.server.logprobs import TokenNames
from moe_local.offload.answer_format.piece import Piece, tool_call


class Shape(Protocol):
    """How one kind of answer is written."""

    @property
    def end(self) -> str | None:
        """What stands behind the chunks of a stream."""

    def whole(self) -> dict[str, Any]:
        """The response, after everything has ended."""

    def keep(self, choice: Choice, piece: Piece) -> None:
        """A piece of an answer that is given whole."""

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first token."""

    def waiting(self) -> Iterator[dict[str, Any]]:
        """Signs of life, when nothing has come for a while."""

    def delta(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunks of one piece."""

    def closing(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """The last chunks of a choice, which say why it ended."""

    def ending(self) -> Iterator[dict[str, Any]]:
        """Chunks behind all others."""

    def failed(self, failure: Failure) -> dict[str, Any]:
        """The last chunk of an answer that an error has ended."""


class CompletionShape:
    """What OpenAI's chats and completions have in common."""

    end = "[DONE]"
    kind: str
    """Of the chunks' objects."""

    def __init__(self, answer: Answer, names: TokenNames | None = None, *, counted: bool = False) -> None:
        """`names`: for log probabilities; None: none are wanted. `counted`: a stream ends with the usage."""
        self._answer = answer
        self._names = names
        self._counted = counted

    def keep(self, choice: Choice, piece: Piece) -> None:
        choice.keep(piece, self._answer.call_id() if piece.call else "")

    def waiting(self) -> Iterator[dict[str, Any]]:
        yield from ()

    def ending(self) -> Iterator[dict[str, Any]]:
        if self._counted:
            head = _head(self._answer, self.kind)
            yield {**head, "choices": [], "usage": self._answer.usage()}

    def failed(self, failure: Failure) -> dict[str, Any]:
        return failure.body()

    def _chunk(self, part: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._counted else {}  # so in all chunks before the one that counts
        return {**_head(self._answer, self.kind), "choices": [part], **usage}


class ChatShape(CompletionShape):
    """chat.completion and chat.completion.chunk."""

    kind = "chat.completion.chunk"

    def whole(self) -> dict[str, Any]:
        return {
            **_head(self._answer, "chat.completion"),
            "choices": [self._choice(choice) for choice in self._answer.choices],
            "usage": self._answer.usage(),
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        for choice in self._answer.choices:
            yield self._delta(choice, {"role": "assistant", "content": ""})

    def delta(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.call is not None:
            call = {"index": choice.calls, **tool_call(piece.call, self._answer.call_id())}
            yield self._delta(choice, {"tool_calls": [call]})
        elif piece.reasoning:
            yield self._delta(choice, {"reasoning_content": piece.reasoning})
        else:
            yield self._delta(choice, {"content": piece.content})

    def closing(self, choice: Choice) -> Iterator[dict[str, Any]]:
        yield self._delta(choice, {}, choice.reason())

    def _delta(self, choice: Choice, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        part = {
            "index": choice.index,
            "delta": delta,
            "finish_reason": reason,
            "logprobs": self._logprobs(choice),
        }
        return self._chunk(part)

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


class TextShape(CompletionShape):
    """text_completion, whole and in chunks."""

    kind = "text_completion"

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
                yield self._chunk(self._part(choice, self._prefix(choice), None))

    def delta(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        yield self._chunk(self._part(choice, piece.content, None))

    def closing(self, choice: Choice) -> Iterator[dict[str, Any]]:
        yield self._chunk(self._part(choice, "", choice.reason()))

    def _prefix(self, choice: Choice) -> str:
        return "" if choice.echo is None else choice.echo.text

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
