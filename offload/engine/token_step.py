"""Forwards of one token of one sequence at fixed addresses, replayed from CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from moe_local.cache.errors import first_line
from moe_local.offload.engine.graphs import Graphs
from moe_local.offload.engine.kv_slab import KVSlab
from moe_local.offload.engine.recording import CapturedStep, Recording, Saw
from moe_local.offload.engine.static_row import static_columns
from moe_local.offload.gpu.relief import shortage
from moe_local.offload.prefetch.routers import RouterSite

logger = logging.getLogger(__name__)


class TokenWatch(Protocol):
    """Is told of every token that a TokenStep computes. Neither call is part of a capture."""

    def begin(self) -> None:
        """The token's work is about to be given to the device."""

    def end(self) -> None:
        """All of the token's work was given to the device. Not called where that raised."""


class TokenStep:
    """Computes the logits of one token of one row, always in the same way, captured or not.

    What is computed depends on the row's length alone (`static_columns`), so a token has the same bits with
    and without a graph. For each number of columns of a row, the first token is computed without a graph
    (libraries set themselves up), the second is captured, and later ones are replayed. If capturing fails,
    that is logged once and no more is captured; a lack of memory does not count, as it may pass (`logits`).
    """

    def __init__(
        self,
        hf: Any,
        kv: KVSlab,
        graphs: Graphs | None,
        *,
        cache_argument: str,
        options: dict[str, Any],
        sites: Sequence[RouterSite | None] = (),
        saw: Saw | None = None,
        watch: TokenWatch | None = None,
    ) -> None:
        """`options`: further arguments of the model's forward. `sites` and `saw` as for a Recording.

        `graphs` None: nothing is captured.
        """
        self._hf = hf
        self._kv = kv
        self._graphs = graphs
        self.failure: str | None = None
        """Why capturing was given up."""
        self._cache_argument = cache_argument
        self._options = options
        self._sites, self._saw = sites, saw
        self._watch = watch
        device = hf.get_input_embeddings().weight.device
        with torch.inference_mode(False):
            self._ids = torch.zeros((1, 1), dtype=torch.long, device=device)
            self._positions = torch.zeros((1, 1), dtype=torch.long, device=device)
            self._columns = {
                card: torch.zeros(1, dtype=torch.long, device=card) for card in kv.devices if card != device
            }
            """The position once more on every other card, for the layers there."""
        self._caches: dict[tuple[int, int], Any] = {}
        """By row and number of columns, of those that a token has been computed with."""
        self.captured: dict[tuple[int, int], CapturedStep] = {}
        """By row and number of columns."""

    def logits(self, row: int, token: int) -> torch.Tensor:
        """[1, vocabulary] fp32 of `token`, put behind the row's tokens; valid until the next call.

        Raises what the experts raise, and torch.OutOfMemoryError where the device's memory does not suffice
        for a capture, having changed no length.
        """
        return self._watched(self._logits, self._prepare(row, token))

    def computed(self, row: int, token: int) -> torch.Tensor:
        """The same logits, without a graph."""
        return self._watched(self._forward, self._prepare(row, token))

    def stop_capturing(self) -> None:
        """Compute from now on, without graphs."""
        self._graphs = None
        self.captured.clear()

    def make_room(self) -> bool:
        """Give up graphs for good, to have their memory back; whether there were any."""
        if self._graphs is None and not self.captured:
            return False
        self.stop_capturing()
        logger.warning("VRAM ran out: tokens are computed without CUDA graphs from now on")
        return True

    @property
    def captures(self) -> bool:
        """Whether tokens are captured, as far as that works."""
        return self._graphs is not None

    def _watched(
        self, compute: Callable[[tuple[int, int]], torch.Tensor], place: tuple[int, int]
    ) -> torch.Tensor:
        if self._watch is None:
            return compute(place)
        self._watch.begin()
        logits = compute(place)
        self._watch.end()
        return logits

    def _logits(self, place: tuple[int, int]) -> torch.Tensor:
        captured = self.captured.get(place)
        if captured is not None and not captured.is_valid:
            captured = None
            self.captured.clear()
        if captured is not None:
            captured.replay()
            return captured.logits
        if self._graphs is None:
            return self._forward(place)
        if place not in self._caches:
            with self._graphs.session():
                return self._forward(place)
        captured = self._capture(place)
        return self._forward(place) if captured is None else captured.logits

    def _prepare(self, row: int, token: int) -> tuple[int, int]:
        """Put the token where the forward reads it; the row and its number of columns."""
        position = self._kv.lens[row]
        self._kv.clear(row)
        self._ids.fill_(token)
        for number in (self._positions, *self._columns.values()):
            number.fill_(position)
        return row, static_columns(position + 1, self._kv.capacity)

    def _forward(self, place: tuple[int, int]) -> torch.Tensor:
        cache = self._caches.get(place)
        if cache is None:
            first = self._positions.view(1)
            cache = self._kv.static_row(*place, {first.device: first, **self._columns}, first)
        output = self._hf(
            input_ids=self._ids,
            position_ids=self._positions,
            **{self._cache_argument: cache},
            **self._options,
        )
        self._caches[place] = cache  # only now: what failed half-way has not set all of itself up
        # A copy in any case: behind the way from another card this may be all that a segment has to do.
        logits: torch.Tensor = output.logits[:, -1].to(torch.float32, copy=True)
        return logits

    def _capture(self, place: tuple[int, int]) -> CapturedStep | None:
        """Do the forward, captured on its way; None if that failed, with nothing left of it."""
        assert self._graphs is not None
        recording = Recording(self._graphs, self._hf, self._sites, self._saw)
        put_back = self._kv.mark(place[0])
        try:
            self.captured[place] = self._record(place, recording)
        except Exception as error:
            if recording.in_experts or shortage(error) is not None:
                raise
            self._give_up(error)
            put_back()
        return self.captured.get(place)

    def _record(self, place: tuple[int, int], recording: Recording) -> CapturedStep:
        assert self._graphs is not None
        self._graphs.make_room()
        with self._graphs.session(), recording.attached():
            try:
                recording.begin()
                return recording.finish(self._forward(place))
            except BaseException:
                self._graphs.abort()
                raise

    def _give_up(self, error: Exception) -> None:
        """Capture no more. What has been captured goes on being replayed."""
        self._graphs = None
        self.failure = f"{type(error).__name__}: {first_line(error)}"
        if self.captured:  # else this is a trial, and who tries says so
            logger.info("no more CUDA graphs are captured: %s", self.failure)
