"""Splitting a streamed answer into content, reasoning and tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from moe_local.cache.files import parse_json
from moe_local.offload.thoughts import CLOSE_THOUGHT, OPEN_THOUGHT

OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
"""As in the templates of Qwen3 and others, with JSON between them. Calls of other forms count as content."""


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`; less than all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


class Piece(NamedTuple):
    """A part of an answer. Exactly one of these is not empty."""

    content: str = ""
    reasoning: str = ""
    call: dict[str, Any] | None = None
    """{"name", "arguments"}, the arguments as JSON text."""


class _Mode(Enum):
    START = "nothing but white space has come"
    THOUGHT = "inside a thought"
    AFTER = "line breaks behind a thought"
    CONTENT = "the answer"
    CALL = "inside a tool call"
    DONE = "behind the only call"


class AnswerParser:
    """Separates reasoning and tool calls from content, while the text arrives in pieces.

    Text that may be the beginning of a mark is held back until that is decided, and a call until it is
    complete. A call that is not well-formed counts as content. Thoughts are recognized only at the start.
    """

    def __init__(
        self, *, thinking: bool = False, tools: bool = False, one_call: bool = False, plain: bool = False
    ) -> None:
        """`thinking`: the prompt has opened a thought. `tools`: whether to look for calls. `one_call`: drop
        all text after the first call. `plain`: all text is content, whatever marks it contains (except calls,
        with `tools`)."""
        self._mode = _Mode.CONTENT if plain else _Mode.THOUGHT if thinking else _Mode.START
        self._tools = tools
        self._one_call = one_call
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether so far only a thought, and perhaps line breaks after it, has arrived."""
        return self._mode in (_Mode.THOUGHT, _Mode.AFTER)

    @property
    def done(self) -> bool:
        """Whether nothing that is added will be shown."""
        return self._mode is _Mode.DONE

    def add(self, text: str) -> Iterator[Piece]:
        self._held += text
        before = None
        while self._held and before != (self._mode, self._held):
            before = self._mode, self._held
            yield from self._advance()

    def flush(self) -> Iterator[Piece]:
        """The text that was held back, once the answer has ended."""
        held, self._held = self._held, ""
        if self._mode is _Mode.CALL:
            held = OPEN_CALL + held
        if held:
            yield Piece(reasoning=held) if self._mode is _Mode.THOUGHT else Piece(content=held)

    def _advance(self) -> Iterator[Piece]:
        match self._mode:
            case _Mode.START:
                stripped = self._held.lstrip()
                if stripped.startswith(OPEN_THOUGHT):
                    self._held, self._mode = stripped.removeprefix(OPEN_THOUGHT), _Mode.THOUGHT
                elif not OPEN_THOUGHT.startswith(stripped):
                    self._mode = _Mode.CONTENT
            case _Mode.THOUGHT:
                thought, closed = self._until(CLOSE_THOUGHT)
                if thought:
                    yield Piece(reasoning=thought)
                self._mode = _Mode.AFTER if closed else _Mode.THOUGHT
            case _Mode.AFTER:
                self._held = self._held.lstrip("\n")
                self._mode = _Mode.CONTENT if self._held else _Mode.AFTER
            case _Mode.CONTENT:
                content, opened = self._until(OPEN_CALL) if self._tools else self._all()
                if content:
                    yield Piece(content=content)
                self._mode = _Mode.CALL if opened else _Mode.CONTENT
            case _Mode.CALL:
                text, closing, rest = self._held.partition(CLOSE_CALL)
                if closing:
                    self._held, self._mode = rest, _Mode.CONTENT
                    call = parse_call(text)
                    yield Piece(call=call) if call else Piece(content=OPEN_CALL + text + CLOSE_CALL)
                    if call and self._one_call:
                        self._mode = _Mode.DONE
            case _Mode.DONE:
                self._held = ""

    def _until(self, mark: str) -> tuple[str, bool]:
        """The text before the mark, and whether the mark was found. Holds back what may be its beginning."""
        text, found, rest = self._held.partition(mark)
        if found:
            self._held = rest
            return text, True
        keep = len(self._held) - overlap(self._held, mark)
        text, self._held = self._held[:keep], self._held[keep:]
        return text, False

    def _all(self) -> tuple[str, bool]:
        text, self._held = self._held, ""
        return text, False


def parse_call(text: str) -> dict[str, Any] | None:
    """{"name", "arguments"} of a call in JSON; None if the text is not a valid call."""
    try:
        call = parse_json(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    try:
        (call["name"] + arguments).encode()
    except UnicodeEncodeError:  # a lone surrogate, which cannot be sent
        return None
    return {"name": call["name"], "arguments": arguments}
