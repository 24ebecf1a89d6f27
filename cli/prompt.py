"""Reading messages from a terminal or a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import click

PROMPT = ">>> "
CONTINUED = "... "
QUOTES = '"""'


class Message(NamedTuple):
    """What was typed, without the space around it; `quoted` between triple quotes, and so never a command."""

    text: str
    quoted: bool

    @property
    def is_command(self) -> bool:
        return self.text.startswith("/") and not self.quoted


class Messages(Iterator[Message]):
    """What the user types: a line, or several between triple quotes.

    On a terminal it prompts, edits and remembers lines, and a Ctrl-C clears the line. Elsewhere it just
    reads.
    """

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - importing it is what makes input() edit lines

    def __next__(self) -> Message:
        text = self._line(PROMPT).strip()
        if text.startswith(QUOTES):
            return Message(self._quoted(text.removeprefix(QUOTES)), quoted=True)
        return Message(text, quoted=False)

    def _quoted(self, text: str) -> str:
        """The rest of a message after its opening quotes, to the closing ones or the end of the input."""
        parts = [text]
        with contextlib.suppress(StopIteration):
            while not parts[-1].rstrip().endswith(QUOTES):
                parts.append(self._line(CONTINUED))
        return "\n".join(parts).rstrip().removesuffix(QUOTES).strip()

    def _line(self, prompt: str) -> str:
        """The next line, without its end. Raises StopIteration when there is none."""
        if not self.interactive:
            line = sys.stdin.readline()
            if not line:
                raise StopIteration
            return line.rstrip("\n")
        while True:
            try:
                return input(prompt)
            except EOFError:
                click.echo()
                raise StopIteration from None
            except KeyboardInterrupt:
                click.echo("\nCtrl-D or /exit leaves.")
