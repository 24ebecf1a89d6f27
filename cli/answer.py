"""Showing an answer: as Markdown if the terminal supports it, else as plain text; thoughts set apart."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType

import click

from moe_local.cli.markdown import MarkdownStream
from moe_local.cli.render import on_stderr, on_stdout
from moe_local.offload.answer_format.piece import Piece

termios: ModuleType | None
try:
    import termios
except ImportError:  # Windows
    termios = None

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Remove escape sequences, and control characters other than line breaks and tabs.

    An answer must not be able to control the terminal.
    """
    return _CONTROL.sub("", text)


def is_rich() -> bool:
    """Whether stdout is a terminal that can redraw lines, and its user has not asked for plain text."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not on_stdout().is_dumb_terminal


@contextmanager
def unheard_keys() -> Iterator[None]:
    """Turn off the terminal's echo, so that typed characters (and the ^C of a Ctrl-C) do not appear in the
    answer or move the cursor away from what is redrawn. What is typed is kept for the next prompt.

    If the process is stopped or killed, the shell restores the terminal itself.
    """
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class AnswerView:
    """Shows the pieces of an answer; a context manager that leaves the cursor at the start of a line.

    On a terminal, thoughts are dim and above the answer. Otherwise only the answer goes to stdout, exactly as
    the model wrote it, and thoughts go to stderr.
    """

    def __init__(self, *, markdown: bool = True) -> None:
        self._terminal = sys.stdout.isatty()
        self._markdown = MarkdownStream(on_stdout()) if markdown and is_rich() else None
        self._stack = ExitStack()
        self._thinking = False
        self._ends_line = True
        """False once some of the answer was printed as plain text, which then needs a final line break."""

    def show(self, pieces: Iterable[Piece]) -> str:
        """The next pieces, as they come. Returns the text of the answer itself in them."""
        text = ""
        for piece in pieces:
            text += piece.content
            if piece.reasoning:
                self.thought(piece.reasoning)
            else:
                self.content(piece.content)
        return text

    def thought(self, text: str) -> None:
        """The next piece of what the model thinks before it answers."""
        if not self._thinking:
            self._thinking = True
            text = text.lstrip("\n")
            self._think("Thinking...\n")
        self._think(text)

    def content(self, text: str) -> None:
        """The next piece of the answer itself."""
        self._end_thought()
        if self._terminal:
            text = printable(text)
        if self._markdown is not None:
            self._markdown.add(text)
        else:
            click.echo(text, nl=False)
            self._ends_line = False

    def __enter__(self) -> AnswerView:
        if is_rich():
            self._stack.enter_context(unheard_keys())
        if self._markdown is not None:
            self._stack.enter_context(self._markdown)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_thought()
        self._stack.close()
        if not self._ends_line:
            click.echo()

    def _end_thought(self) -> None:
        if self._thinking:
            self._thinking = False
            self._think("\n...done thinking.\n\n")

    def _think(self, text: str) -> None:
        console = on_stdout() if self._terminal else on_stderr()
        console.print(printable(text) if self._terminal else text, style="dim", markup=False, end="")
