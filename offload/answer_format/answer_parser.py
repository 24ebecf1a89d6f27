"""Splitting a streamed answer into content, reasoning and tool calls, by the marks around the latter two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from moe_local.offload.answer_format.call_syntax import CallSyntax
from moe_local.offload.answer_format.piece import Piece, overlap
from moe_local.offload.thoughts import THINK, ThoughtMarks


class _Mode(Enum):
    START = "nothing but white space has come"
    THOUGHT = "inside a thought"
    AFTER = "line breaks behind a thought"
    CONTENT = "the answer"
    SECTION = "between the calls of a section"
    CALL = "inside a tool call"
    DONE = "behind the only call"


class AnswerParser:
    """A Parser of answers with a thought, then content with tool calls in it.

    A call that is not well-formed counts as content, with its marks. Thoughts are recognized only at the
    start. White space beside calls, with no words, is no content: models part their calls by line breaks.
    """

    def __init__(
        self,
        syntax: CallSyntax | None = None,
        functions: Mapping[str, Any] | None = None,
        *,
        thoughts: ThoughtMarks = THINK,
        thinking: bool = False,
        one_call: bool = False,
        plain: bool = False,
    ) -> None:
        """`functions`: parameters, as JSON schemas, of the functions that may be called; without them, or
        without a `syntax`, calls are content. `thinking`: the prompt has opened a thought. `one_call`: drop
        all text after the first call. `plain`: thoughts are content, too."""
        self._mode = _Mode.CONTENT if plain else _Mode.THOUGHT if thinking else _Mode.START
        self._syntax = None if functions is None else syntax
        self._functions = functions or {}
        self._thoughts = thoughts
        self._one_call = one_call
        self._held = ""
        self._marks = ""
        """What has come since the content, or since the last call: content, too, unless a call follows."""
        self._broken = False
        """Whether the open section has had a call that was content."""
        self._blank = ""
        """White space since the last call or the start: content if words follow, or no call ever comes."""
        self._spoken = False
        """Whether there have been words since then."""
        self._has_called = False

    @property
    def thinking(self) -> bool:
        return self._mode in (_Mode.THOUGHT, _Mode.AFTER)

    @property
    def done(self) -> bool:
        return self._mode is _Mode.DONE

    def add(self, text: str) -> Iterator[Piece]:
        self._held += text
        before = None
        while self._held and before != (self._mode, self._held):
            before = self._mode, self._held
            yield from self._advance()

    def flush(self, *, cut: bool = False) -> Iterator[Piece]:
        yield from self._rest(cut)
        if self._blank and not self._has_called:
            yield Piece(content=self._blank)
        self._blank = ""

    def _rest(self, cut: bool) -> Iterator[Piece]:
        held, self._held = self._held, ""
        if self._mode in (_Mode.CALL, _Mode.SECTION) and self._syntax is not None:
            calls = None
            if self._mode is _Mode.CALL and not cut:  # models may forget the last mark
                calls = self._syntax.parse(held, self._functions)
            if calls:
                yield from self._called(calls)
                return
            nothing_said = self._mode is _Mode.SECTION and not (self._marks or self._broken)
            if cut or nothing_said:
                return
            held, self._marks = self._marks + held, ""
        if held and self._mode is _Mode.THOUGHT:
            yield Piece(reasoning=held)
        else:
            yield from self._say(held)

    def _advance(self) -> Iterator[Piece]:
        match self._mode:
            case _Mode.START:
                stripped, begin = self._held.lstrip(), self._thoughts.begin
                if stripped.startswith(begin):
                    self._held, self._mode = stripped.removeprefix(begin), _Mode.THOUGHT
                elif not begin.startswith(stripped):
                    self._mode = _Mode.CONTENT
            case _Mode.THOUGHT:
                yield from self._thought()
            case _Mode.AFTER:
                self._held = self._held.lstrip("\n")
                self._mode = _Mode.CONTENT if self._held else _Mode.AFTER
            case _Mode.CONTENT:
                yield from self._content()
            case _Mode.SECTION:
                yield from self._section()
            case _Mode.CALL:
                yield from self._call()
            case _Mode.DONE:
                self._held = ""

    def _thought(self) -> Iterator[Piece]:
        calls = [self._opening] if self._syntax is not None and self._syntax.ends_thought else []
        thought, closed = self._until(self._thoughts.closing, *calls)
        if thought:
            yield Piece(reasoning=thought)
        if closed in calls:
            self._held, self._mode = closed + self._held, _Mode.CONTENT
        elif closed:
            self._mode = _Mode.AFTER

    def _content(self) -> Iterator[Piece]:
        if self._syntax is None:
            text, self._held = self._held, ""
            yield Piece(content=text)
            return
        opening = self._opening
        bare = self._syntax.bare
        text, opened = self._until(opening, *([bare] if bare else []))
        yield from self._say(text)
        if opened and opened == bare:
            self._marks, self._held = "", bare + self._held
        elif opened:
            self._marks = opening
        if opened:
            self._broken = False
            self._mode = _Mode.SECTION if self._syntax.section else _Mode.CALL

    def _section(self) -> Iterator[Piece]:
        """White space, then a call, or the section's end; anything else is content again."""
        assert self._syntax is not None
        assert self._syntax.section is not None
        opening, closing = self._syntax.opening, self._syntax.section[1]
        stripped = self._held.lstrip()
        blank = self._held[: len(self._held) - len(stripped)]
        if stripped.startswith(opening):
            self._marks += blank + opening
            self._held, self._mode = stripped.removeprefix(opening), _Mode.CALL
        elif stripped.startswith(closing):
            self._held, self._mode = stripped.removeprefix(closing), _Mode.CONTENT
            if self._marks or self._broken:
                yield from self._say(self._marks + blank + closing)
            self._marks = ""
        elif not (opening.startswith(stripped) or closing.startswith(stripped)):
            said, self._marks = self._marks + blank, ""
            self._held, self._mode = stripped, _Mode.CONTENT
            yield from self._say(said)

    def _call(self) -> Iterator[Piece]:
        assert self._syntax is not None
        found = self._syntax.split(self._held)
        if found is None:
            return
        text, rest = found
        calls = self._syntax.parse(text, self._functions)
        said, self._held = self._marks + self._held[: len(self._held) - len(rest)], rest
        self._marks = ""
        self._mode = _Mode.SECTION if self._syntax.section else _Mode.CONTENT
        if calls:
            yield from self._called(calls)
        else:
            self._broken = True
            yield from self._say(said)

    def _say(self, text: str) -> Iterator[Piece]:
        self._blank += text
        if self._spoken or self._blank.strip():
            text, self._blank, self._spoken = self._blank, "", True
            if text:
                yield Piece(content=text)

    def _called(self, calls: list[dict[str, Any]]) -> Iterator[Piece]:
        if self._one_call:
            self._mode = _Mode.DONE
            calls = calls[:1]
        self._blank, self._spoken, self._has_called = "", False, True
        for call in calls:
            yield Piece(call=call)

    @property
    def _opening(self) -> str:
        """Of a call, or of a run of them."""
        assert self._syntax is not None
        return self._syntax.section[0] if self._syntax.section else self._syntax.opening

    def _until(self, *marks: str) -> tuple[str, str]:
        """The text before the first of the marks, and that mark; "" if none was found. Holds back what may be
        the beginning of one."""
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            text, self._held = self._held[:at], self._held[at + len(mark) :]
            return text, mark
        keep = len(self._held) - overlap(self._held, *marks)
        text, self._held = self._held[:keep], self._held[keep:]
        return text, ""
