"""Reading messages from a terminal or a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

PROMPT = ">>> "
CONTINUED = "... "
QUOTES = '"""'


class Messages(Iterator[str]):
    """What the user types: a line, or several between triple quotes, without the space around them.

    On a terminal it prompts, edits and remembers lines, and a Ctrl-C clears the line. Elsewhere it just
    reads.
    """

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - importing it is what makes input() edit lines

    def __next__(self) -> str:
        text = self._line(PROMPT).strip()
        return self._quoted(text.removeprefix(QUOTES)) if text.startswith(QUOTES) else text

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
