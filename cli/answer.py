"""An answer on the screen: Markdown where the terminal can, plain text where it cannot, thoughts apart."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType

import click

from moe_local.cli.markdown import MarkdownStream
from moe_local.cli.render import on_stderr, on_stdout

termios: ModuleType | None
try:
    import termios
except ImportError:  # Windows
    termios = None

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Without escape sequences and control characters other than line breaks and tabs.

    An answer must not drive the terminal.
    """
    return _CONTROL.sub("", text)


def is_rich() -> bool:
    """Whether stdout is a terminal that can redraw lines, and its user has not asked for plain text."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not on_stdout().is_dumb_terminal


@contextmanager
def unheard_keys() -> Iterator[None]:
    """What is typed meanwhile, a Ctrl-C included, is not shown: it would stand in the answer, and move the
    cursor away from what is drawn anew. It waits for the next prompt.

    A shell sets its terminal right itself after a process that was stopped or killed.
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
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class AnswerView:
    """Where an answer's pieces go; a context manager, whose end leaves the cursor on a line of its own.

    On a terminal, thoughts are dim and above the answer. Elsewhere the answer alone is on stdout, as the
    model wrote it, and thoughts are on stderr.
    """

    def __init__(self, *, markdown: bool = True) -> None:
        self._terminal = sys.stdout.isatty()
        self._markdown = MarkdownStream(on_stdout()) if markdown and is_rich() else None
        self._stack = ExitStack()
        self._thinking = False
        self._ends_line = True
        """Whether what was printed last, thoughts aside, ended its line; nothing needs no end."""

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
