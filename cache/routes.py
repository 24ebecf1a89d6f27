"""Recorded routing: which experts each token chose in each layer; read from and written to CSV.

The format is `route_trace v1` of BigMoeOnEdge (docs/bench-data/2026-07-15-route-trace): a comment line with
the version, one with the model and its sizes, one for each layer with its bytes, a line of column names,
then one line for each expert of each layer of each step. A step is one token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from moe_local.cache.errors import RoutesError
from moe_local.cache.files import write_atomically

VERSION = "# route_trace v1"
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
_MODEL = re.compile(r"# model=(.*) arch=(\S+) n_layer=(\d+) n_expert=(\d+) n_expert_used=(\d+)")
_LAYER = re.compile(r"# layer=(\d+) expert_bytes=(\d+) dense_bytes=(\d+)")


class Phase(IntEnum):
    PREFILL = 0
    DECODE = 1


class LayerBytes(NamedTuple):
    """Bytes of one layer: of each of its experts, and of everything else in it."""

    expert: int
    dense: int


class LayerRoute(NamedTuple):
    """One token's routing in one layer: four tuples over its top-k experts, in the router's order."""

    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    """The router's weights, as the recorder normalized them."""
    resident: tuple[bool, ...]
    """Whether the recording engine had the expert in its cache."""
    moved_bytes: tuple[int, ...]
    """Bytes that the recording engine moved for the expert."""


class RouteStep(NamedTuple):
    """One token of a turn of a conversation. Layers may be missing: most of a prompt skips the last one."""

    turn: int
    phase: Phase
    step: int
    layers: tuple[LayerRoute, ...]


@dataclass(frozen=True, slots=True)
class Routes:
    """A recording. `steps` are in the order of (turn, step), the layers of each in ascending order."""

    model: str
    arch: str
    num_experts: int
    top_k: int
    layers: tuple[LayerBytes, ...]
    steps: tuple[RouteStep, ...]

    def phase(self, phase: Phase) -> Iterator[RouteStep]:
        """The steps of one phase, in order."""
        return (step for step in self.steps if step.phase is phase)


class _Line(NamedTuple):
    """One line of the table, parsed."""

    turn: int
    phase: Phase
    step: int
    layer: int
    slot: int
    expert: int
    weight: float
    resident: bool
    moved_bytes: int


def read_routes(path: str | os.PathLike[str]) -> Routes:
    """Read a whole recording. Raises RoutesError with the file, the line number and what is wrong."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RoutesError(f"cannot read routes from {os.fspath(path)}: {reason}") from error
    number = 1
    try:
        reader = _Reader()
        for number, line in enumerate(lines, 1):  # noqa: B007 - named in the error
            reader.take(line)
        return reader.finish()
    except ValueError as error:
        raise RoutesError(f"{os.fspath(path)}, line {number}: {error}") from None


class _Reader:
    """Parses the file line by line; raises ValueError with what is wrong with the current line."""

    def __init__(self) -> None:
        self._take = self._version
        self._header = ("", "", 0, 0, 0)
        self._layers: list[LayerBytes] = []
        self._open: list[_Line] = []
        self._steps: dict[tuple[int, int], tuple[Phase, dict[int, LayerRoute]]] = {}

    def take(self, line: str) -> None:
        self._take(line)

    def finish(self) -> Routes:
        if self._take != self._row:
            raise ValueError("the file ends before its table begins")
        self._close()
        model, arch, _, num_experts, top_k = self._header
        steps = tuple(
            RouteStep(turn, phase, step, tuple(layers[layer] for layer in sorted(layers)))
            for (turn, step), (phase, layers) in sorted(self._steps.items())
        )
        return Routes(model, arch, num_experts, top_k, tuple(self._layers), steps)

    def _version(self, line: str) -> None:
        if line != VERSION:
            raise ValueError(f"{line[:40]!r} instead of {VERSION!r}; only this version is read")
        self._take = self._model

    def _model(self, line: str) -> None:
        match = _MODEL.fullmatch(line)
        if match is None:
            raise ValueError("not '# model=... arch=... n_layer=... n_expert=... n_expert_used=...'")
        self._header = (match[1], match[2], int(match[3]), int(match[4]), int(match[5]))
        self._take = self._layer

    def _layer(self, line: str) -> None:
        expected = len(self._layers)
        if expected == self._header[2]:
            if line != COLUMNS:
                raise ValueError(f"{line[:40]!r} instead of the columns {COLUMNS}")
            self._take = self._row
            return
        match = _LAYER.fullmatch(line)
        if match is None or int(match[1]) != expected:
            raise ValueError(f"not '# layer={expected} expert_bytes=... dense_bytes=...'")
        self._layers.append(LayerBytes(int(match[2]), int(match[3])))

    def _row(self, line: str) -> None:
        row = self._parse(line)
        slot = len(self._open)
        if slot and self._open[0][:4] != row[:4]:
            self._close()
            slot = 0
        if row.slot != slot:
            raise ValueError(f"slot {row.slot} where {slot} is due")
        if any(other.expert == row.expert for other in self._open):
            raise ValueError(f"expert {row.expert} was chosen twice by one token")
        self._open.append(row)

    def _parse(self, line: str) -> _Line:
        cells = line.split(",")
        if len(cells) != len(_Line._fields):
            raise ValueError(f"{len(cells)} columns instead of {len(_Line._fields)}")
        turn, phase, step, layer, slot, expert, resident, moved = map(_whole, cells[:6] + cells[7:])
        _, _, num_layers, num_experts, top_k = self._header
        limits = (("phase", phase, 2), ("layer", layer, num_layers), ("slot", slot, top_k))
        for name, value, limit in (*limits, ("expert", expert, num_experts), ("residency", resident, 2)):
            if value >= limit:
                raise ValueError(f"{name} {value} is not below {limit}")
        return _Line(turn, Phase(phase), step, layer, slot, expert, _weight(cells[6]), bool(resident), moved)

    def _close(self) -> None:
        """Turn the rows collected for one layer of one step, now complete, into a LayerRoute."""
        rows, self._open = self._open, []
        if not rows:
            return
        first, top_k = rows[0], self._header[4]
        place = f"turn {first.turn}, step {first.step}, layer {first.layer}"
        if len(rows) != top_k:
            raise ValueError(f"{place} ends with {len(rows)} experts of {top_k}")
        phase, layers = self._steps.setdefault((first.turn, first.step), (first.phase, {}))
        if phase is not first.phase:
            raise ValueError(f"{place} is in both phases")
        if first.layer in layers:
            raise ValueError(f"{place} comes twice")
        layers[first.layer] = LayerRoute(
            first.layer,
            tuple([row.expert for row in rows]),
            tuple([row.weight for row in rows]),
            tuple([row.resident for row in rows]),
            tuple([row.moved_bytes for row in rows]),
        )


def _whole(cell: str) -> int:
    # int() would also accept signs, blanks and underscores.
    if not (cell.isascii() and cell.isdigit()):
        raise ValueError(f"{cell!r} is not a whole number")
    return int(cell)


def _weight(cell: str) -> float:
    try:
        weight = float(cell)
    except ValueError:
        weight = float("nan")
    if not abs(weight) < float("inf"):
        raise ValueError(f"weight {cell!r} is not a finite number")
    return weight


def write_routes(path: str | os.PathLike[str], routes: Routes) -> None:
    """Write a recording, step by step, weights with six significant digits. Raises OSError.

    Atomic: `path` holds either the old file or the whole new one.
    """
    write_atomically(path, (line + "\n" for line in _lines(routes)))


def _lines(routes: Routes) -> Iterable[str]:
    yield VERSION
    yield (
        f"# model={routes.model} arch={routes.arch} n_layer={len(routes.layers)} "
        f"n_expert={routes.num_experts} n_expert_used={routes.top_k}"
    )
    for layer, size in enumerate(routes.layers):
        yield f"# layer={layer} expert_bytes={size.expert} dense_bytes={size.dense}"
    yield COLUMNS
    for step in routes.steps:
        for route in step.layers:
            start = f"{step.turn},{step.phase:d},{step.step},{route.layer}"
            choices = zip(route.experts, route.weights, route.resident, route.moved_bytes, strict=True)
            for slot, (expert, weight, resident, moved) in enumerate(choices):
                yield f"{start},{slot},{expert},{weight:g},{resident:d},{moved}"
