"""What answers are split into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

Call = dict[str, Any]
"""{"name", "arguments"} of a tool call, the arguments as JSON text."""


def tool_call(call: Call, call_id: str) -> dict[str, Any]:
    """A call as OpenAI's messages have it."""
    return {"id": call_id, "type": "function", "function": call}


class Piece(NamedTuple):
    """A part of an answer. Exactly one of these is not empty."""

    content: str = ""
    reasoning: str = ""
    call: Call | None = None


class Parser(Protocol):
    """Separates reasoning and tool calls from content, while the text arrives in pieces.

    Text that may be the beginning of a mark is held back until that is decided, and a call until it is
    complete.
    """

    @property
    def thinking(self) -> bool:
        """Whether so far only thoughts, and perhaps line breaks behind them, have arrived."""

    @property
    def done(self) -> bool:
        """Whether nothing that is added will be shown."""

    def add(self, text: str) -> Iterator[Piece]:
        """What the next text completes."""

    def flush(self, *, cut: bool = False) -> Iterator[Piece]:
        """What was held back, once the answer has ended. `cut`: by a limit or a stop string, not by itself.

        A call that was cut is left out: its markup is no text for a reader, and with half of its arguments
        nobody can make the call. That something is missing, the reason for the end says.
        """


def overlap(text: str, *marks: str) -> int:
    """How many characters at the end of `text` may be the beginning of a mark; less than all of it."""
    for length in range(min(len(text), max(map(len, marks), default=1) - 1), 0, -1):
        if any(len(mark) > length and mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
