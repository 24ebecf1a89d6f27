"""Reading messages from a terminal or a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from moe_local.cli.text_file import read_stdin

if TYPE_CHECKING:
    from moe_local.cli.editor import Editor

PROMPT = ">>> "
CONTINUED = "... "
QUOTES = '"""'


class Message(NamedTuple):
    """What was typed, stripped of white space; `quoted` if in triple quotes, so that it is not a command."""

    text: str
    quoted: bool

    @property
    def is_command(self) -> bool:
        return self.text.startswith("/") and not self.quoted and "\n" not in self.text


def can_edit() -> bool:
    """Whether the terminal can move its cursor, as an editor must."""
    return os.environ.get("TERM", "dumb" if sys.platform != "win32" else "").lower() not in (
        "dumb",
        "unknown",
    )


class Messages(Iterator[Message]):
    """Iterates over the user's messages: a line each, or several lines between triple quotes.

    On a terminal it prompts and keeps a history. A Ctrl-C clears what was typed; a second one in a row ends
    the input, as Ctrl-D does. `editor` edits the lines, or without it Python's readline if there is one. If
    not on a terminal, it just reads stdin.
    """

    def __init__(self, interactive: bool, editor: Editor | None = None) -> None:
        self.interactive = interactive
        self.editor = editor
        if interactive and editor is None:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - importing it is what makes input() edit lines

    def __next__(self) -> Message:
        interrupted = False
        while True:
            try:
                return self._message()
            except EOFError:
                if self.interactive:
                    click.echo()
                raise StopIteration from None
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                if interrupted:
                    click.echo()
                    raise StopIteration from None
                interrupted = True
                click.echo("\nCtrl-D or /bye leaves, and so does Ctrl-C once more.")

    def _message(self) -> Message:
        text = self._line(PROMPT).strip()
        if text.startswith(QUOTES):
            return Message(self._quoted(text.removeprefix(QUOTES)), quoted=True)
        return Message(text, quoted=False)

    def _quoted(self, text: str) -> str:
        """The rest of a message after its opening quotes, to the closing ones or the end of the input."""
        parts = [text]
        with contextlib.suppress(EOFError):
            while not parts[-1].rstrip().endswith(QUOTES):
                parts.append(self._line(CONTINUED))
        return "\n".join(parts).rstrip().removesuffix(QUOTES).strip()

    def _line(self, prompt: str) -> str:
        """The next line without its line break; an editor returns a whole message. Raises EOFError at the
        end."""
        if self.editor is not None:
            return self.editor.read(prompt, CONTINUED)
        if self.interactive:
            return input(prompt)
        line = read_stdin(line=True)
        if not line:
            raise EOFError
        return line.rstrip("\r\n")
