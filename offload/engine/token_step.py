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
    """Called before and after every token that a TokenStep computes. Neither call is part of a capture."""

    def begin(self) -> None:
        """Called before the token's work is enqueued on the device."""

    def end(self) -> None:
        """Called after all of the token's work was enqueued. Not called if that raised."""


class TokenStep:
    """Computes the logits of one token of one row, with the same operations whether captured or not.

    The computation depends on the row's length alone (`static_columns`), so a token has the same bits with
    and without a graph. For each number of columns of a row, the first token is computed without a graph
    (libraries initialize themselves then), the second is captured, and later ones are replayed. If a capture
    fails, that is logged once and nothing more is captured; a lack of memory, which may be temporary, does
    not count as such a failure (`logits`).
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
        """Why no more graphs are captured; None: no capture has failed."""
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
            """A copy of the position on every other card, for the layers there."""
        self._caches: dict[tuple[int, int], Any] = {}
        """By (row, number of columns), for those with which a token has been computed."""
        self.captured: dict[tuple[int, int], CapturedStep] = {}
        """By (row, number of columns)."""

    def logits(self, row: int, token: int) -> torch.Tensor:
        """The logits [1, vocabulary], fp32, of `token` after the row's tokens; valid until the next call.

        Raises what the experts raise, and torch.OutOfMemoryError if the device's memory does not suffice for
        a capture; no length has changed then.
        """
        return self._watched(self._logits, self._prepare(row, token))

    def computed(self, row: int, token: int) -> torch.Tensor:
        """The same logits, without a graph."""
        return self._watched(self._forward, self._prepare(row, token))

    def stop_capturing(self) -> None:
        """Compute without graphs from now on."""
        self._graphs = None
        self.captured.clear()

    def make_room(self) -> bool:
        """Give up graphs for good to free their memory; returns whether they were in use."""
        if self._graphs is None and not self.captured:
            return False
        self.stop_capturing()
        logger.warning("VRAM ran out: tokens are computed without CUDA graphs from now on")
        return True

    @property
    def captures(self) -> bool:
        """Whether tokens are captured where possible."""
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
        """Write the token and its position to where the forward reads them; (row, number of columns)."""
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
        self._caches[place] = cache  # only now: libraries may not be initialized after a failure
        # Always a copy: after a transfer from another card it may be the only operation of the last segment.
        logits: torch.Tensor = output.logits[:, -1].to(torch.float32, copy=True)
        return logits

    def _capture(self, place: tuple[int, int]) -> CapturedStep | None:
        """Compute the forward while capturing it; None if that failed, and then its effects are undone."""
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
        """Capture no more graphs. Those that exist are still replayed."""
        self._graphs = None
        self.failure = f"{type(error).__name__}: {first_line(error)}"
        if self.captured:  # else this is a trial, whose caller logs the reason
            logger.info("no more CUDA graphs are captured: %s", self.failure)
