"""Answers that are written part by part, as those of OpenAI's Responses and of Anthropic's Messages are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from moe_local.cli.server.answers import Answer, Choice
from moe_local.offload.answer_format.piece import Piece


class PartedShape(ABC):
    """An answer of parts that follow one another: thoughts, texts, calls. Each is opened, grows, is closed.

    A whole answer is made by the same events, which then nobody is sent. White space is held back until a
    text follows, since otherwise the line break between two calls would be a text.
    """

    end = None
    thought: str
    text: str
    """What the parts are called."""

    def __init__(self, answer: Answer) -> None:
        """`answer`: with one choice."""
        self._answer = answer
        self._parts: list[dict[str, Any]] = []
        self._open: str | None = None
        """What the last part is called, if it is a thought or a text that may grow."""
        self._grown: list[str] = []
        """Its text so far."""
        self._blank = ""

    def whole(self) -> dict[str, Any]:
        for choice in self._answer.choices:
            _exhaust(self.closing(choice))
        _exhaust(self.ending())
        return self._written()

    def keep(self, choice: Choice, piece: Piece) -> None:
        _exhaust(self.delta(choice, piece))

    def delta(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.call is not None:
            self._blank = ""
            yield from self._close()
            yield from self._call(piece.call)
        elif piece.reasoning:
            yield from self._add(self.thought, piece.reasoning)
        elif self._open == self.text or (self._blank + piece.content).strip():
            yield from self._add(self.text, self._blank + piece.content)
            self._blank = ""
        else:
            self._blank += piece.content

    def closing(self, choice: Choice) -> Iterator[dict[str, Any]]:
        if not self._parts:
            yield from self._add(self.text, self._blank)
        yield from self._close()

    @abstractmethod
    def ending(self) -> Iterator[dict[str, Any]]: ...

    def _add(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if self._open != kind:
            yield from self._close()
            self._open = kind
            yield from self._begin(kind)
        if text:
            self._grown.append(text)
            yield from self._grow(kind, text)

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            yield from self._end(self._open, "".join(self._grown))
            self._open, self._grown = None, []

    @abstractmethod
    def _written(self) -> dict[str, Any]:
        """The answer so far."""

    @abstractmethod
    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        """A thought or a text, which is a part from now on."""

    @abstractmethod
    def _grow(self, kind: str, text: str) -> Iterator[dict[str, Any]]: ...

    @abstractmethod
    def _end(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """`text`: all of it."""

    @abstractmethod
    def _call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A part that comes whole. `call`: {"name", "arguments"}, the arguments as JSON text."""


def _exhaust(events: Iterator[dict[str, Any]]) -> None:
    for _ in events:
        pass
