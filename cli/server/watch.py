"""The cache and the counters at one moment, for whoever asks: the page, Prometheus, curl."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

from fastapi.responses import Response

import moe_local
from moe_local.cache.cache_map import CacheMap, CacheView
from moe_local.cache.stats import Stats
from moe_local.cli.server.failures import Failure
from moe_local.offload.batcher import Batcher

DIGITS = bytes.maketrans(bytes(range(10)), b"0123456789")
FRESH_SECONDS = 0.1
"""Who asks so soon after another is given the same picture."""
PATIENCE_SECONDS = 2.0
"""For the end of a step, before an older picture is given."""
FIRST_SECONDS = 30.0
"""The same, where there is none."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Taken between two steps."""

    at_s: float
    """Seconds since the server started."""
    step_s: float
    """Seconds spent in steps since the batcher was made."""
    stats: Stats
    prompt_tokens: int
    """Of all prompts, those that were taken over among them."""
    reused_tokens: int
    experts: CacheMap
    """Of the fastest tier: absent, resident or loading."""
    slots: tuple[int, ...]
    """By layer. Fewer than at the start where VRAM had to be given back."""


class Watch:
    """Takes pictures of a model in its batcher's thread, one for all who ask at the same time."""

    def __init__(self, model: moe_local.Model, batcher: Batcher) -> None:
        self._model = model
        self._batcher = batcher
        self._started = time.monotonic()
        self._view: CacheView | None = None
        self._last: Picture | None = None
        self._coming: asyncio.Future[Picture] | None = None

    async def picture(self, fresh_s: float = 0.0) -> Picture:
        """One that is not older than that, if the model lets one be taken, else the last.

        In the event loop. Raises Failure where there is none yet.
        """
        last = self._last
        if last is not None and self._now() - last.at_s < fresh_s:
            return last
        if self._coming is None:
            self._coming = asyncio.wrap_future(self._batcher.look(self._take))
            self._coming.add_done_callback(self._came)
        patience = FIRST_SECONDS if last is None else PATIENCE_SECONDS
        done, _ = await asyncio.wait([self._coming], timeout=patience)
        if done:
            return done.pop().result()
        if last is None:
            raise Failure(503, "the model is busy with one long step; try again later", "server_error")
        return last

    def _came(self, coming: asyncio.Future[Picture]) -> None:
        self._coming = None
        if not coming.cancelled() and coming.exception() is None:
            self._last = coming.result()

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _take(self) -> Picture:
        """In the batcher's thread."""
        store = self._model.parts.store
        stats = store.snapshot()  # first: it brings the tables up to date where a device serves misses
        self._view = self._view or self._model.cache_view()
        experts = self._view.look()
        slots = tuple(store.slots(layer) for layer in range(len(experts.cells)))
        batcher = self._batcher
        tokens = batcher.prompt_tokens, batcher.reused_tokens
        return Picture(self._now(), batcher.step_s, stats, *tokens, experts, slots)

    async def report(self) -> Response:
        """What GET /v1/cache answers: see docs/server.md."""
        # Made here, not by FastAPI, which would look at each of thousands of numbers.
        body = json.dumps(self._describe(await self.picture(FRESH_SECONDS)), separators=(",", ":"))
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    def _describe(self, picture: Picture) -> dict[str, Any]:
        plan = self._model.plan
        return {
            "object": "cache",
            "model": self._model.name,
            "mode": plan.mode,
            "tier": "ram" if plan.request.vram is None else "vram",
            "time": round(picture.at_s, 4),
            "step_s": round(picture.step_s, 6),
            "slots": picture.slots,
            "states": [bytes(row).translate(DIGITS).decode() for row in picture.experts.cells],
            "uses": picture.stats.routed.counts,
            "counts": picture.stats.to_dict(),
            "running": self._batcher.running,
            "waiting": self._batcher.waiting,
            "parallel": self._batcher.rows,
        }
