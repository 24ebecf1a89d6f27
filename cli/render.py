"""Output of commands: progress bars and status lines on stderr, tables and JSON on stdout."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moe_local.cache.keys import three_digits

if TYPE_CHECKING:
    from moe_local.cache.stats import PrefetchStats
    from moe_local.offload.records import GenerationStats

LEAST_COLUMNS = 16
"""Text is not wrapped to fewer columns than this."""


def on_stderr() -> Console:
    """A console on stderr; plain text if that is not a terminal."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def on_stdout() -> Console:
    """A console on stdout; plain text if that is not a terminal."""
    return Console(highlight=False, soft_wrap=True)


def is_of_output(error: Exception) -> bool:
    """Whether printing has failed: nobody reads, or a disk is full. Errors of files name their file."""
    codes = (errno.EPIPE, errno.ENOSPC)
    return isinstance(error, OSError) and error.errno in codes and error.filename is None


def show_cursor(console: Console) -> None:
    """Show the cursor that rich hides while it draws, since after Ctrl-Z or a kill it would stay hidden."""
    console.show_cursor(True)


def print_json(document: Any) -> None:
    """Print the only JSON document of a command with --json."""
    click.echo(json.dumps(document, indent=2))


class ProgressBar:
    """Draws the progress that `load` and `convert` report, on stderr, and only if that is a terminal.

    with ProgressBar() as progress: load(..., progress=progress)
    """

    def __init__(self, unit: str = "experts") -> None:
        """`unit`: what is counted."""
        self._unit = unit
        self._visible = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=on_stderr(),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of `what` are finished."""
        if not self._visible:
            return
        if what not in self._tasks:
            for task in self._tasks.values():
                self._progress.remove_task(task)
            self._tasks = {what: self._progress.add_task(f"{what} {self._unit}", total=total)}
            self._progress.start()
            show_cursor(self._progress.console)
        self._progress.update(self._tasks[what], completed=done, total=total)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:  # before 14.3, rich prints an empty line even for a disabled bar
            self._progress.stop()


def status_line(stats: GenerationStats) -> str:
    """The figures of one answer in one line, such as
    "21.4 tok/s | first token 0.31 s | 87.5 % hits | stall 12.1 ms/token | 128 tokens"."""
    parts = []
    if stats.tokens_per_s:
        parts.append(f"{stats.tokens_per_s:.1f} tok/s")
    parts.append(f"first token {stats.ttft_s:.2f} s")
    needed = stats.hits + stats.misses
    if needed:
        parts.append(f"{100 * stats.hits / needed:.1f} % hits")
    if stats.new_tokens:
        parts.append(f"stall {1000 * stats.stall_s / stats.new_tokens:.1f} ms/token")
    parts.append(f"{stats.new_tokens} token{'' if stats.new_tokens == 1 else 's'}")
    return " | ".join(parts)


def prefetch_worth(prefetch: PrefetchStats) -> str:
    """State and gain of prefetch: "on, 2 layers ahead: +3.10 ms/token (+2.80 to +3.41) gained by it"."""
    ahead = f", {prefetch.lookahead} layer{'' if prefetch.lookahead == 1 else 's'} ahead"
    text = prefetch.state + (ahead if prefetch.lookahead else "")
    gain, low, high = prefetch.gain_ms_per_token, prefetch.gain_ms_low, prefetch.gain_ms_high
    if gain is None:
        return text
    span = "" if low is None or high is None else f" ({low:+.2f} to {high:+.2f})"
    return f"{text}: {gain:+.2f} ms/token{span} gained by it"


def print_status(text: str) -> None:
    """Print a dim line on stderr; on a terminal it wraps between words."""
    console = on_stderr()
    console.print(text, style="dim", markup=False, soft_wrap=not console.is_terminal)


def print_line(text: str) -> None:
    """Print a line on stdout; on a terminal it wraps between words."""
    for line in wrapped(text, 0):
        click.echo(line)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table as plain text on stdout."""
    for line in table_lines([column.upper() for column in columns], rows):
        click.echo(line)


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table in plain text; each column is as wide as its widest value."""
    table = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        line = "   ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True))
        yield line.rstrip()


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns on stdout."""
    rows = list(fields)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        for line in wrapped(value, width + 4):
            click.echo(f"  {name:<{width}}  {line}")
            name = ""


def wrapped(text: str, indent: int) -> list[str]:
    """The text wrapped between words to fit the terminal after `indent` columns; unwrapped if stdout is not a
    terminal, or if too few columns are left."""
    room = shutil.get_terminal_size().columns - indent
    if sys.stdout is None or not sys.stdout.isatty() or room < LEAST_COLUMNS:
        return [text]
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [text]


def count(number: int) -> str:
    """46702792704 -> "46.7 B"."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * size:  # rounds to 1.00 of this unit rather than 1000 of the next smaller one
            return f"{three_digits(number / size)} {unit}"
    return str(number)
