"""The measurement itself: rounds in which workloads and variants take turns, and their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from moe_local.cache.stats import BytesMoved, RoutedTokens
from moe_local.offload.measure.figures import hit_rates, spread, timeline, times
from moe_local.offload.measure.floor import Floor
from moe_local.offload.measure.machine import drop_page_cache, storage_bytes
from moe_local.offload.measure.ratio import Ratio
from moe_local.offload.measure.routing import RoutePlayer, RouteRecorder, running
from moe_local.offload.measure.sample import Sample, Step, Taker
from moe_local.offload.measure.variants import AS_LOADED, Switches, Variant
from moe_local.offload.measure.workloads import Workload
from moe_local.offload.model import Model


@dataclass(slots=True)
class Measured:
    """The samples of one workload of one variant."""

    workload: Workload
    variant: Variant
    warm_up: Sample | None = None
    """The untimed first run, whose decoding begins with an empty cache; hit rates come from it."""
    samples: list[Sample] = field(default_factory=list)
    storage: list[float] = field(default_factory=list)
    """For each sample, the share of the bytes read from the disk tier that were not in the page cache."""


class Bench:
    """Measures a loaded model, which it does not own; nothing else may use the model meanwhile.

    Round 0 warms up and is not timed; in it the cache is emptied once more after the first prompt, so that
    hit rates begin cold. Every other run begins with an empty cache, too, but its prompt then fills the
    cache. In disk mode the expert file is dropped from the page cache before each run, as far as the system
    allows. All variants and workloads take turns in each round, and the first one changes between rounds.
    """

    def __init__(
        self,
        model: Model,
        switches: Switches,
        workloads: Sequence[Workload],
        *,
        compare: bool,
        tokens: int,
        repeats: int,
        recorder: RouteRecorder | None = None,
        player: RoutePlayer | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        watch: Callable[[Step], None] | None = None,
    ) -> None:
        """`compare`: measure the main workload, which is the first, with every variant of `switches`, too."""
        self.model = model
        self.interrupted = False
        self.tokens = tokens
        self._switches = switches
        self._recorder = recorder
        self._player = player
        self._progress = progress
        self._watch = watch
        self._repeats = repeats
        self._files = sorted(model.expert_folder.glob("*.safetensors"))
        self.results = [Measured(workload, AS_LOADED) for workload in workloads]
        if compare:
            self.results += [Measured(workloads[0], variant) for variant in switches.variants()]
        self.used = RoutedTokens()
        """How often each expert was chosen, over all runs."""

    def run(self) -> None:
        """Run all rounds; a Ctrl-C ends them, and the results so far are kept."""
        runs, done = (self._repeats + 1) * len(self.results), 0
        routed = self.model.parts.store.routed
        before = routed.snapshot()
        try:
            for number in range(self._repeats + 1):
                first = number % len(self.results)
                for measured in self.results[first:] + self.results[:first]:
                    if self._progress is not None:
                        self._progress("measuring", done, runs)
                    self._take(measured, number)
                    done += 1
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            self.used = routed.snapshot() - before
            self._switches.restore()

    def _take(self, measured: Measured, number: int) -> None:
        store, variant = self.model.parts.store, measured.variant
        self.model.parts.engine.forget()
        self._switches.begin(variant)
        if self.model.plan.mode == "disk":
            drop_page_cache(self._files)
        if self._player is not None:
            self._player.rewind()
        cold = number == 0
        emptied = False

        def before() -> None:
            nonlocal emptied
            if not variant.cache or (cold and not emptied):
                store.empty()
                emptied = True

        taker = Taker(
            self.model,
            self.tokens,
            answering=None if self._recorder is None else self._recorder.answering,
            before=before if cold or not variant.cache else None,
            after=self._watch,
        )
        read, moved = storage_bytes(), store.snapshot(routed=False).bytes.disk
        with self._recorded(measured, number):
            measured.workload.run(taker, self.model.tokenizer, number)
        if cold:
            measured.warm_up = taker.sample
            return
        measured.samples.append(taker.sample)
        moved = store.snapshot(routed=False).bytes.disk - moved
        if read is not None and moved:
            measured.storage.append(min(1.0, ((storage_bytes() or read) - read) / moved))

    def _recorded(self, measured: Measured, number: int) -> AbstractContextManager[None]:
        """Record routes in warm-ups of the model as loaded, except of the batch, whose answers overlap."""
        if self._recorder is None or number or measured.variant != AS_LOADED:
            return nullcontext()
        return nullcontext() if measured.workload.name == "batch" else running(self.model, self._recorder)


def summary(measured: Measured, floor: Floor) -> dict[str, Any]:
    """The figures of one workload of one variant; only the warm-up's if there are no timed samples."""
    document: dict[str, Any] = {"workload": measured.workload.summary, "repeats": len(measured.samples)}
    if measured.warm_up is not None:
        document["hit_rate"] = hit_rates(measured.warm_up)
    if not measured.samples:
        return document
    document |= times(measured.samples)
    from_storage = sum(measured.storage) / len(measured.storage) if measured.storage else 1.0
    moved = document["bytes_per_token"]
    bound = floor.with_misses(BytesMoved(int(moved["h2d"]), int(moved["disk"])), from_storage)
    document["floor_with_misses_ms_per_token"] = bound
    document["share_of_floor"] = floor.ms_per_token / document["tpot_ms"]["mean"]
    document["disk_share_from_storage"] = from_storage if measured.storage else None
    return document


def comparison(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """Each variant compared with the model as loaded, over rounds that both finished: ratios of tokens/s."""
    base = results[0]
    rows = []
    for measured in results:
        rounds = min(len(base.samples), len(measured.samples))
        if measured.variant == AS_LOADED or not rounds:
            continue
        ours = [s.decode_tokens / s.decode_s for s in measured.samples[:rounds]]
        theirs = [s.decode_tokens / s.decode_s for s in base.samples[:rounds]]
        rows.append(
            {
                "name": measured.variant.name,
                "decode": Ratio.of(ours, theirs).to_dict(),
                "prefill": Ratio.of(
                    [s.prompt_tokens / s.prefill_s for s in measured.samples[:rounds]],
                    [s.prompt_tokens / s.prefill_s for s in base.samples[:rounds]],
                ).to_dict(),
                "tokens_per_s": spread(ours),
                "same_ids": [s.ids for s in measured.samples[:rounds]]
                == [s.ids for s in base.samples[:rounds]],
                "figures": times(measured.samples),
                "hit_rate": hit_rates(measured.warm_up) if measured.warm_up is not None else None,
            }
        )
    return rows


def timelines(measured: Measured) -> list[list[dict[str, Any]]]:
    """Every decode step of each timed sample."""
    return [timeline(sample) for sample in measured.samples]
