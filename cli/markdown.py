"""Streaming Markdown to a terminal: finished blocks are printed once, and only the last is redrawn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.segment import Segment

from moe_local.cli.render import show_cursor

LEAST_SECONDS = 0.06
"""Least time between two drawings; the eye would not see more of them."""
SHARE = 20
"""The next drawing comes no sooner than this many times the duration of the last: tokens wait for drawing,
so it may take at most 5 % of the time."""
MARGIN = 2
"""Lines of the terminal that the redrawn part leaves free, since lines that scroll off cannot be redrawn."""

_PARSER = MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline"])
"""As in rich, but HTML is text: rich leaves it out, and with it the <int> of a vector<int>."""


def split_blocks(text: str) -> tuple[list[str], str]:
    """The top-level Markdown blocks that no further text can change, and the rest of the text.

    A block ends where the next one begins. Only complete lines can begin one: "1" may become "1. one", an
    item of the preceding list.
    """
    whole, newline, partial = text.rpartition("\n")
    lines = (whole + newline).splitlines(keepends=True)
    starts = [token.map[0] for token in _PARSER.parse(whole + newline) if token.level == 0 and token.map]
    starts = sorted(set(starts))
    if len(starts) < 2:
        return [], text
    ends = [*starts[1:]]
    blocks = ["".join(lines[start:end]) for start, end in zip([0, *starts[1:-1]], ends, strict=True)]
    return blocks, "".join(lines[starts[-1] :]) + partial


class _LeftHeading(Heading):
    """A left-aligned heading; rich centres those of the first level and, before 14.3, all."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.justify = "left"
        yield text


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
    }

    def __init__(self, markup: str, **settings: Any) -> None:
        super().__init__(markup, **settings)
        self.parsed = _PARSER.parse(markup)


class _Lines:
    """A renderable of lines that are rendered already."""

    def __init__(self, lines: Sequence[Sequence[Segment]]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            yield from line
            yield Segment.line()


class MarkdownStream:
    """Draws Markdown on a terminal while it arrives in pieces; a context manager whose exit prints the rest.

    If an unfinished block, such as a list or code, outgrows the terminal, its first lines are printed for
    good.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail = ""
        self._printed = 0
        """How many rendered lines of the tail have been printed already."""
        self._any = False
        self._next = 0.0
        self._live: Live | None = None

    def add(self, text: str) -> None:
        """The next piece."""
        self._tail += text
        started = time.monotonic()
        if started >= self._next:
            self._draw()
            ended = time.monotonic()
            self._next = ended + max(LEAST_SECONDS, SHARE * (ended - started))

    def __enter__(self) -> MarkdownStream:
        return self

    def __exit__(self, *exception: object) -> None:
        """Print the rest, and in any case restore the terminal."""
        try:
            blocks, tail = split_blocks(self._tail)
            for block in [*blocks, tail]:
                self._finish(block)
            self._tail = ""
            if self._live is not None:
                self._live.update(_Lines([]), refresh=True)
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _draw(self) -> None:
        blocks, self._tail = split_blocks(self._tail)
        if self._live is None:
            self._live = Live(
                console=self._console, transient=True, auto_refresh=False, vertical_overflow="crop"
            )
            self._live.start()
            show_cursor(self._console)
        for block in blocks:
            self._finish(block)
        lines = self._render(self._tail)
        room = max(1, self._console.height - MARGIN)
        beyond = len(lines) - self._printed - room
        if beyond > 0:
            self._print(lines[self._printed : self._printed + beyond])
            self._printed += beyond
        self._live.update(_Lines(lines[self._printed :]), refresh=True)

    def _finish(self, block: str) -> None:
        """Print the lines of a finished block that are not printed yet."""
        lines = self._render(block)
        if self._live is not None:
            self._live.update(_Lines([]))  # otherwise it would be drawn again below the printed lines
        self._print(lines[self._printed :])
        self._printed = 0
        self._any = self._any or bool(lines)

    def _print(self, lines: Sequence[Sequence[Segment]]) -> None:
        if lines:
            self._console.print(_Lines(lines), end="")

    def _render(self, block: str) -> list[list[Segment]]:
        """The lines of a block, after an empty line if anything was printed before."""
        if not block.strip():
            return []
        options = self._console.options.update(height=None)
        markdown = _Markdown(block, code_theme="ansi_dark", hyperlinks=False)
        lines = list(_stripped(self._console.render_lines(markdown, options, pad=False)))
        return [[], *lines] if self._any and lines else lines


def _stripped(lines: list[list[Segment]]) -> Iterator[list[Segment]]:
    """Remove empty lines at both ends."""
    full = [number for number, line in enumerate(lines) if any(part.text.strip() for part in line)]
    if full:
        yield from map(_trimmed, lines[full[0] : full[-1] + 1])


def _trimmed(line: list[Segment]) -> list[Segment]:
    """Remove padding spaces at the end: they would be copied with the text, and wrap in a narrower window."""
    line = [*line]
    while line and not (line[-1].style and line[-1].style.bgcolor):
        last = line.pop()
        if text := last.text.rstrip(" "):
            line.append(Segment(text, last.style))
            break
    return line
