"""Splitting an answer of gpt-oss, which is a row of messages, each in a channel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from moe_local.offload.answer_format.call_syntax import json_call
from moe_local.offload.answer_format.piece import Piece, overlap
from moe_local.offload.thoughts import CHANNEL, MESSAGE, START

END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
ENDS = (END, CALL, RETURN, START)
"""What ends a message. START begins the next one, too, if a model leaves out the end."""
ASSISTANT = "assistant"
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
FUNCTIONS = "functions."


class _Kind(Enum):
    HEADER = "what stands before a message"
    REASONING = "analysis, and calls of tools that are no functions there"
    CONTENT = "final, and commentary for the user"
    CALL = "commentary for a function"
    DONE = "behind the only call"


class HarmonyParser:
    """A Parser of `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`.

    Analysis is reasoning, a message to a function is a call, all else content; messages of the same kind are
    told apart by an empty line. Calls that are not well-formed count as content, with their marks.
    """

    def __init__(
        self, begun: str, functions: Mapping[str, Any] | None = None, *, one_call: bool = False
    ) -> None:
        """`begun`: what the prompt has of the answer's first message, without its text: at least the role.
        `functions`, `one_call`: as AnswerParser has them."""
        self._kind = _Kind.HEADER
        self._functions = functions
        self._one_call = one_call
        self._held = begun
        self._header = ""
        """Of the message under way."""
        self._name = ""
        """Of the function that is called."""
        self._said: set[_Kind] = set()
        """The kinds of messages so far that had text..."""
        self._told = False
        """...and whether this one had some."""
        self._begin()

    @property
    def thinking(self) -> bool:
        return (
            _Kind.REASONING in self._said
            and self._kind in (_Kind.HEADER, _Kind.REASONING)
            and not (self._said - {_Kind.REASONING})
        )

    @property
    def done(self) -> bool:
        return self._kind is _Kind.DONE

    def add(self, text: str) -> Iterator[Piece]:
        self._held += text
        before = None
        while self._held and before != (self._kind, self._held):
            before = self._kind, self._held
            match self._kind:
                case _Kind.HEADER:
                    self._begin()
                case _Kind.CALL:
                    yield from self._call()
                case _Kind.DONE:
                    self._held = ""
                case kind:
                    yield from self._tell(kind)

    def flush(self, *, cut: bool = False) -> Iterator[Piece]:
        held, self._held = self._held, ""
        match self._kind:
            case _Kind.HEADER:
                rest = _without_role(held)
                if rest.strip() and not cut:
                    yield from self._piece(_Kind.CONTENT, rest)
            case _Kind.CALL:
                if not cut:
                    yield from self._called(held, "")
            case _Kind.REASONING | _Kind.CONTENT as kind:
                yield from self._piece(kind, held)

    def _begin(self) -> None:
        """A message begins where its header ends; or at once, for a model that writes no header."""
        if not _may_be_header(self._held):
            self._held = _without_role(self._held)
            self._kind, self._told = _Kind.CONTENT, False
            return
        header, found, rest = self._held.partition(MESSAGE)
        if found:
            self._header, self._held = header, rest
            self._kind, self._told = self._kind_of(header), False

    def _kind_of(self, header: str) -> _Kind:
        to = RECIPIENT.search(header)
        name = to[1].removeprefix(FUNCTIONS) if to else ""
        if self._functions is not None and (name in self._functions or (to and to[1].startswith(FUNCTIONS))):
            self._name = name
            return _Kind.CALL
        channel = header.partition(CHANNEL)[2].lstrip()
        if channel.startswith("analysis"):
            return _Kind.REASONING
        return _Kind.CONTENT

    def _tell(self, kind: _Kind) -> Iterator[Piece]:
        ended = self._ended()
        keep = ended[0] if ended else len(self._held) - overlap(self._held, *ENDS)
        text, self._held = self._held[:keep], self._held[keep:]
        yield from self._piece(kind, text)
        if ended:
            self._close(ended[1])

    def _piece(self, kind: _Kind, text: str) -> Iterator[Piece]:
        if not text:
            return
        if not self._told and kind in self._said:
            text = f"\n\n{text}"
        self._said.add(kind)
        self._told = True
        yield Piece(reasoning=text) if kind is _Kind.REASONING else Piece(content=text)

    def _call(self) -> Iterator[Piece]:
        ended = self._ended()
        if ended is None:
            return
        where, end = ended
        text, self._held = self._held[:where], self._held[where:]
        self._close(end)
        yield from self._called(text, "" if end == START else end)

    def _called(self, text: str, end: str) -> Iterator[Piece]:
        self._said.add(_Kind.CALL)
        calls = json_call(self._name, text)
        if calls is None:
            self._told = False
            yield from self._piece(_Kind.CONTENT, _without_role(self._header) + MESSAGE + text + end)
            return
        for call in calls:
            yield Piece(call=call)
        if self._one_call:
            self._kind = _Kind.DONE

    def _ended(self) -> tuple[int, str] | None:
        """Where the message ends, and the mark there."""
        found = [(where, end) for end in ENDS if (where := self._held.find(end)) >= 0]
        return min(found, default=None)

    def _close(self, end: str) -> None:
        """The message ends with the mark that comes next."""
        self._kind = _Kind.HEADER
        if end != START:
            self._held = self._held.removeprefix(end)


def _without_role(header: str) -> str:
    return header.lstrip().removeprefix(START).removeprefix(ASSISTANT)


def _may_be_header(text: str) -> bool:
    text = text.lstrip()
    for part in (START, ASSISTANT):
        if part.startswith(text):
            return True
        text = text.removeprefix(part).lstrip()
    marks = (CHANNEL, CONSTRAIN, MESSAGE, "to=", *ENDS)
    return any(mark.startswith(text) or text.startswith(mark) for mark in marks)
