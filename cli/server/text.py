"""Answers as they come, cut into what clients want apart: stop strings, reasoning, tool calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

OPEN_THOUGHT, CLOSE_THOUGHT = "<think>", "</think>"


def opens_thought(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether a prompt of these ids ends inside a thought, as some templates do."""
    return bool(tokenizer.decode(ids[-8:]).rstrip().endswith(OPEN_THOUGHT))


OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
"""As templates of Qwen, DeepSeek, GLM and many others have them; what a model marks otherwise is content."""


class StopFilter:
    """Lets text through up to the first stop string, which it holds back: clients don't want to see it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What of the text so far can be shown and has not been."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
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


class AnswerParser:
    """Tells reasoning and tool calls from content, while the text arrives in pieces.

    An unfinished mark is held back until it is one or is none; a call, until it is whole. What looks like a
    call and is not well-formed is content. Thoughts are looked for at the start only.
    """

    def __init__(self, *, thinking: bool = False, tools: bool = False, plain: bool = False) -> None:
        """`thinking`: the prompt has opened a thought. `tools`: calls are looked for. `plain`: no marks."""
        self._mode = _Mode.CONTENT if plain else _Mode.THOUGHT if thinking else _Mode.START
        self._tools = tools
        self._held = ""

    def add(self, text: str) -> Iterator[Piece]:
        self._held += text
        before = None
        while self._held and before != (self._mode, self._held):
            before = self._mode, self._held
            yield from self._advance()

    def flush(self) -> Iterator[Piece]:
        """What was held back, now that nothing follows."""
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

    def _until(self, mark: str) -> tuple[str, bool]:
        """The text before the mark, and whether that has come. Keeps what may be the mark's beginning."""
        text, found, rest = self._held.partition(mark)
        if found:
            self._held = rest
            return text, True
        keep = len(self._held) - _overlap(self._held, mark)
        text, self._held = self._held[:keep], self._held[keep:]
        return text, False

    def _all(self) -> tuple[str, bool]:
        text, self._held = self._held, ""
        return text, False


def parse_call(text: str) -> dict[str, Any] | None:
    """{"name", "arguments"} of a call in JSON; None if it is none."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"name": call["name"], "arguments": arguments}


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
