"""CUDA graphs of a model on several cards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from moe_local.offload.engine.graphs import Graph, Graphs


class CardGraphs:
    """Graphs of several devices, each captured on one of them, in that device's session and memory pool.

    A capture on one card cannot synchronize with work on another card, in neither direction. So transfers
    between cards take place between two captures.
    """

    def __init__(self, cards: Mapping[torch.device, Graphs]) -> None:
        """Sessions begin on the first of `cards`."""
        self._cards = dict(cards)
        self._first = next(iter(self._cards.values()))
        self._current = self._first

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        self._current = self._first
        with contextlib.ExitStack() as sessions:
            for graphs in reversed(self._cards.values()):  # the last one entered becomes the current device
                sessions.enter_context(graphs.session())
            yield

    def begin(self, device: torch.device | None = None) -> None:
        if device is not None:
            self._current = self._cards[device]
        self._current.begin()

    def end(self) -> Graph:
        return self._current.end()

    def abort(self) -> None:
        self._current.abort()

    def make_room(self) -> None:
        for graphs in self._cards.values():
            graphs.make_room()
