"""Figures for Prometheus: tokens, times, hits and misses, stall by cause, bytes by link."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from moe_local.cache.cache_map import Cell
from moe_local.cli.server.watch import Picture
from moe_local.offload.batcher import Batcher, Ended, Listener
from moe_local.offload.records import Token

TTFT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TPOT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """What happened since the server began. Own registry: two servers in a process don't mix."""

    def __init__(self, batcher: Batcher) -> None:
        self.started = int(time.time())
        self._batcher = batcher
        self._registry = CollectorRegistry()
        self._ttft = Histogram(
            "moe_local_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=TTFT_BUCKETS,
            registry=self._registry,
        )
        self._tpot = Histogram(
            "moe_local_time_per_output_token_seconds",
            "Between two tokens of an answer.",
            buckets=TPOT_BUCKETS,
            registry=self._registry,
        )
        self._answers = Counter(
            "moe_local_answers", "Answers, by how they ended.", ["end"], registry=self._registry
        )
        for end in ("stop", "length", "cancelled", "error"):
            self._answers.labels(end)
        self._picture: Picture | None = None
        self._registry.register(self)

    def watching(self, listener: Listener) -> Listener:
        """The listener, with its tokens counted on their way."""
        seen = 0

        def watch(event: Token | Ended) -> None:
            nonlocal seen
            if isinstance(event, Token):
                (self._tpot if seen else self._ttft).observe(event.ms / 1000)
                seen += 1
            else:
                end = event.reason or ("cancelled" if event.error is None else "error")
                self._answers.labels(str(end)).inc()
            listener(event)

        return watch

    def render(self, picture: Picture) -> str:
        """With the counters as they are in `picture`. In the event loop."""
        self._picture = picture
        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Any]:
        """Prometheus' collector protocol."""
        if self._picture is None:  # asked for the names, when it was registered
            return
        stats = self._picture.stats
        yield _counter("tokens", "New tokens.", stats.tokens)
        yield _counter("step_seconds", "Time in which answers were computed.", self._picture.step_s)
        yield _counter("expert_hits", "Experts needed and resident in the fastest tier.", stats.hits)
        yield _counter("expert_misses", "Experts needed and absent.", stats.misses)
        yield _counter("expert_evictions", "Experts that had to leave.", stats.evictions)
        cells = [cell for row in self._picture.experts.cells for cell in row]
        yield _gauge("expert_slots", "Experts that the fastest tier has room for.", sum(self._picture.slots))
        yield _gauge("experts", "Experts of the model.", len(cells))
        yield _gauge("experts_resident", "Experts in the fastest tier.", cells.count(Cell.RESIDENT))
        yield _gauge("experts_loading", "Experts on their way there.", cells.count(Cell.LOADING))
        stall = CounterMetricFamily(
            "moe_local_stall_seconds", "Time that nothing could be computed, by cause.", labels=["cause"]
        )
        for cause, seconds in asdict(stats.stall).items():
            stall.add_metric([cause], seconds)
        yield stall
        moved = CounterMetricFamily("moe_local_bytes", "Bytes moved, by link.", labels=["link"])
        for link, nbytes in asdict(stats.bytes).items():
            moved.add_metric([link], nbytes)
        yield moved
        prefetch = CounterMetricFamily("moe_local_prefetch", "Experts prefetched.", labels=["what"])
        for what in ("issued", "used", "late"):
            prefetch.add_metric([what], getattr(stats.prefetch, what))
        yield prefetch
        yield _counter("prefetch_wasted_bytes", "Prefetched, and never needed.", stats.prefetch.wasted_bytes)
        reused = self._picture.reused_tokens
        prompts = CounterMetricFamily(
            "moe_local_prompt_tokens",
            "Of prompts, computed or taken over from an earlier turn.",
            labels=["how"],
        )
        prompts.add_metric(["computed"], self._picture.prompt_tokens - reused)
        prompts.add_metric(["reused"], reused)
        yield prompts
        yield _gauge("requests_running", "Answers under way.", self._batcher.running)
        yield _gauge("requests_waiting", "Requests in the queue.", self._batcher.waiting)
        yield _gauge("requests_parallel", "Most answers under way at a time.", self._batcher.rows)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"moe_local_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"moe_local_{name}", text, value=value)
