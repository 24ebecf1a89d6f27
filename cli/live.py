"""Drawing the cache as a map and the stalls of tokens as bars, for /cache, /stats and bench --watch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from moe_local.cache.cache_map import CacheMap, Cell
from moe_local.cache.stats import Stats
from moe_local.cli.answer import printable
from moe_local.cli.render import on_stdout, show_cursor

if TYPE_CHECKING:
    from moe_local import Model

LOOKS = {
    Cell.ABSENT: ("·", "dim"),
    Cell.RESIDENT: ("□", "blue"),
    Cell.LOADING: ("▒", "yellow"),
    Cell.USED: ("■", "bold green"),
    Cell.MISSED: ("×", "bold red"),
}
"""The character and style of each state. The characters differ, since terminals without colours are
common."""
STALLS = {"demand": "red", "late_prefetch": "yellow", "disk": "magenta", "cpu": "cyan", "sync": "blue"}
"""Colours of the causes of stalls."""
BAR = 40
"""Characters of the longest bar, if the terminal is wide enough."""
BESIDE = 26
"""Columns that a bar's cause and figure need beside it."""
AROUND = (12, 6)
"""Lines and columns of the terminal that a map leaves free."""
LOOK_SECONDS = 0.1
"""Least time between two pictures, since looking at thousands of experts takes a millisecond."""
FADE = 0.8
"""Weight of the earlier steps in the exponential moving average of times."""


def draw_map(cache: CacheMap, rows: int, columns: int) -> Text:
    """The map, with a line per layer, or per several layers if there are more than `rows`; and a legend."""
    text = Text()
    for first, cells in cache.shrunk(rows, columns):
        text.append(f"{first:>4} ", "dim")
        for cell in cells:
            text.append(*LOOKS[cell])
        text.append("\n")
    text.append("    ")
    for cell, (character, style) in LOOKS.items():
        text.append(f" {character}", style)
        text.append(f" {cell.name.lower()}")
    return text


def draw_stalls(stall_ms: Mapping[str, float], ms: float | None = None) -> Text:
    """A bar for each cause with stalls, in milliseconds per token. With `ms`, the total time of a token, also
    a bar for the rest of it."""
    parts = {cause: value for cause, value in stall_ms.items() if value > 0}
    longest = ms if ms is not None else max(parts.values(), default=0.0)
    if ms is not None:
        parts["other"] = max(0.0, ms - sum(parts.values()))
    text = Text()
    bar = max(1, min(BAR, shutil.get_terminal_size().columns - BESIDE))
    for cause, value in parts.items():
        length = round(bar * value / longest) if longest else 0
        text.append(f"{cause.replace('_', ' '):>13} ")
        text.append("█" * length, STALLS.get(cause, "green"))
        text.append(" " * (bar - length) + f" {value:8.2f} ms\n")
    if not parts:
        text.append("no stalls\n", "dim")
    text.rstrip()
    return text


def draw(cache: CacheMap, stall_ms: Mapping[str, float], ms: float | None, title: str = "") -> RenderableType:
    """The map above the stalls, as large as the terminal allows."""
    columns, lines = shutil.get_terminal_size()
    parts: list[RenderableType] = [Text(title, "bold")] if title else []
    return Group(
        *parts,
        draw_map(cache, max(4, lines - AROUND[0]), max(8, columns - AROUND[1])),
        draw_stalls(stall_ms, ms),
    )


class LivePicture:
    """A picture of a generating model: the cache now, and a moving average of the stalls per token."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._view = model.cache_view()
        self._next = 0.0
        self._looked = False
        self._ms: float | None = None
        self._stall: dict[str, float] = {}

    def after(self, ms: float, counts: Stats, tokens: int = 1) -> RenderableType | None:
        """What to draw after a step of `tokens` that took `ms`; None if the last picture is recent."""
        share = 1.0 if self._ms is None else 1 - FADE
        each = max(1, tokens)
        self._ms = (1 - share) * (self._ms or 0.0) + share * ms / each
        for cause, seconds in asdict(counts.stall).items():
            before = self._stall.get(cause, 0.0)
            self._stall[cause] = (1 - share) * before + share * 1000 * seconds / each
        now = time.monotonic()
        if now < self._next:
            return None
        cache = self._look()
        if not self._looked:  # so that the picture, after the next step, shows only what that step used
            self._looked = True
            return None
        self._looked, self._next = False, now + LOOK_SECONDS
        return draw(cache, self._stall, self._ms, f"{self._model.name}: {self._ms:.1f} ms a token")

    def _look(self) -> CacheMap:
        return self._view.look(self._model.stats().routed.counts)


class LiveAnswer:
    """Shows an answer while it is generated, with the picture of the model below it; a context manager.

    At its end, both disappear from the screen: the caller has to print `text`, the answer.
    """

    def __init__(self, model: Model, console: Console | None = None) -> None:
        """`console`: where to draw; by default stdout."""
        self.text = ""
        self._model = model
        self._picture = LivePicture(model)
        self._counts = model.stats()
        self._console = console or on_stdout()
        self._live = Live(console=self._console, transient=True, auto_refresh=False, vertical_overflow="crop")

    def show(self, text: str, ms: float) -> None:
        """The text of the next token, which took `ms`."""
        self.text += text
        counts = self._model.stats()
        drawn = self._picture.after(ms, counts - self._counts)
        self._counts = counts
        if drawn is not None:
            width, height = self._console.size
            lines = Text(printable(self.text[-width * height :])).wrap(self._console, width)
            # a third of the screen, unless the picture leaves less
            room = min(height // 3, height - 1 - len(self._console.render_lines(drawn)))
            self._live.update(Group(*lines[-max(1, room) :], drawn), refresh=True)

    def __enter__(self) -> LiveAnswer:
        self._live.start()
        show_cursor(self._console)
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()
