"""Splitting an answer of Llama 4, whose calls have no marks of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from moe_local.offload.answer_format.llama import Llama
from moe_local.offload.answer_format.piece import Call, Parser, Piece, overlap

MARKS = (Llama.opening, Llama.closing)
BETWEEN = " \n\t;,"
"""What may stand between calls."""


class _Mode(Enum):
    START = "where a call may begin"
    CALL = "what may be a call"
    CONTENT = "the answer, up to a mark"
    DONE = "behind the only call"


class LlamaParser:
    """A Parser of calls at the beginning of an answer, behind another call, or behind a mark.

    The marks themselves are left out. Text that begins like a call is held back until that is decided.
    """

    def __init__(
        self,
        thoughts: Parser,
        syntax: Llama,
        functions: Mapping[str, Any] | None = None,
        *,
        one_call: bool = False,
    ) -> None:
        """`thoughts`: separates these from all else. `functions`, `one_call`: as AnswerParser has them."""
        self._thoughts = thoughts
        self._syntax = syntax
        self._functions = functions
        self._one_call = one_call
        self._mode = _Mode.START
        self._held = ""
        self._tried = 0
        """Characters of what may be a call that are not all of it."""
        self._blank = ""
        """White space since the last call or the start: content if words follow, or no call ever comes."""
        self._spoken = self._has_called = False

    @property
    def thinking(self) -> bool:
        return self._thoughts.thinking

    @property
    def done(self) -> bool:
        return self._mode is _Mode.DONE

    def add(self, text: str) -> Iterator[Piece]:
        yield from self._split(self._thoughts.add(text))

    def flush(self, *, cut: bool = False) -> Iterator[Piece]:
        yield from self._split(self._thoughts.flush(cut=cut))
        held, self._held = self._held, ""
        if self._mode is not _Mode.DONE and not (cut and self._mode is _Mode.CALL):
            yield from self._say(held)
        if self._blank and not self._has_called:
            yield Piece(content=self._blank)
        self._blank = ""

    def _split(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if not piece.content:
                yield piece
                continue
            self._held += piece.content
            before = None
            while self._held and before != (self._mode, self._held):
                before = self._mode, self._held
                yield from self._advance()

    def _advance(self) -> Iterator[Piece]:
        match self._mode:
            case _Mode.START:
                self._start()
            case _Mode.CALL:
                yield from self._call()
            case _Mode.CONTENT:
                found = [(at, mark) for mark in MARKS if (at := self._held.find(mark)) >= 0]
                keep = min(found)[0] if found else len(self._held) - overlap(self._held, *MARKS)
                text, self._held = self._held[:keep], self._held[keep:]
                self._mode = _Mode.START if found else _Mode.CONTENT
                yield from self._say(text)
            case _Mode.DONE:
                self._held = ""

    def _start(self) -> None:
        text = self._held.lstrip(BETWEEN if self._has_called else None)
        mark = next((mark for mark in MARKS if text.startswith(mark)), None)
        if mark is not None:
            self._held = text.removeprefix(mark)
        elif self._may_be_call(text):
            self._mode, self._tried = _Mode.CALL, 0
        elif not any(mark.startswith(text) for mark in MARKS):
            self._mode = _Mode.CONTENT

    def _call(self) -> Iterator[Piece]:
        text = self._held.lstrip(BETWEEN if self._has_called else None)
        read = self._syntax.read(text, self._functions or {}, self._tried)
        self._tried = len(text)
        if read is not None:
            calls, self._held = read
            self._mode = _Mode.START
            yield from self._called(calls)
        elif not self._may_be_call(text):
            self._mode = _Mode.CONTENT

    def _may_be_call(self, text: str) -> bool:
        return bool(text) and self._functions is not None and self._syntax.may_be_call(text, self._functions)

    def _called(self, calls: list[Call]) -> Iterator[Piece]:
        if self._one_call:
            self._mode = _Mode.DONE
            calls = calls[:1]
        self._blank, self._spoken, self._has_called = "", False, True
        for call in calls:
            yield Piece(call=call)

    def _say(self, text: str) -> Iterator[Piece]:
        self._blank += text
        if self._spoken or self._blank.strip():
            text, self._blank, self._spoken = self._blank, "", True
            if text:
                yield Piece(content=text)
