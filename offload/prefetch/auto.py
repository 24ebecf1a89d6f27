"""Prefetching that measures how much time it saves, and switches itself off where it saves none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from moe_local.offload.prefetch.pilot import Pilot
from moe_local.offload.prefetch.predictor import RouterPredictor
from moe_local.offload.prefetch.prefetch import Guess
from moe_local.offload.prefetch.spare_link import EXPECTED, Accuracy, SpareLink
from moe_local.offload.store.store import ExpertStore

MOST_LOOKAHEAD = 4
MOST_TOKENS = 8
"""Steps of more tokens are not prefetched for: they need most of a layer's experts anyway."""
ASKING = 2.0
"""Total host time of guessing, as a multiple of the time that running the routers takes."""
LOOK = 16
"""Tokens between two updates of how long a layer takes and how often it misses."""


class AutoPrefetcher:
    """Predicts as many layers ahead as makes tokens fastest, and issues the loads that the link has time for.

    A `Pilot` decides how many layers ahead to predict, by comparing the times of tokens; while it says 0, the
    only cost is one call per layer. `SpareLink` weighs each guess with how often such guesses have been right
    (`Accuracy`). No lookahead is tried while tokens wait so little for experts that guessing must cost more
    than it saves. The measured gain is written to the cache's counters (`prefetch_gain`), for Stats.
    """

    def __init__(
        self,
        store: ExpertStore,
        predictor: RouterPredictor,
        *,
        copy_seconds: Callable[[int], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`copy_seconds(nbytes)`: the time of one copy to the device; None where demand loads overtake
        prefetches (see SpareLink)."""
        self.accuracy = Accuracy()
        self.link = SpareLink(copy_seconds)
        self._store = store
        self._predictor = predictor
        self._clock = clock
        self._pilot = Pilot(max(1, min(MOST_LOOKAHEAD, predictor.layers - 1)), self._promising)
        self._lookahead = 0
        self._layer = predictor.layers
        """The last layer that called `predict`."""
        self._tokens = 0
        """Tokens of the current step."""
        self._began = 0.0
        self._guessed: dict[int, dict[int, tuple[int, int]]] = {}
        """Layer -> absent expert that was guessed for it -> (distance, rank), requested or not."""
        self._predict_s: float | None = None
        self._tally = store.tally()
        self._since_look, self._seconds, self._stalled, self._missed = 0, 0.0, 0.0, 0
        self._stall_s = 0.0
        """Seconds that a token waits for experts."""
        self._publish()

    def predict(self, layer: int, tokens: int) -> list[Guess]:
        if layer <= self._layer:  # not `layer == 0`: a layer all of whose experts have slots never calls this
            self._begin_step(tokens)
        self._layer = layer
        return self._predictor.predict(layer, self._lookahead) if self._lookahead else []

    def request(
        self,
        layer: int,
        needed: Sequence[int],
        guesses: Sequence[Guess],
        experts: Sequence[Sequence[int]],
    ) -> None:
        if self._guessed and (guessed := self._guessed.pop(layer, None)):
            for expert, (distance, rank) in guessed.items():
                self.accuracy.saw(distance, rank, expert in needed)
        for guess, ranked in zip(guesses, experts, strict=True):
            self._ask(guess, ranked)

    def saw(self, layer: int, residual: torch.Tensor) -> None:
        if self._lookahead:
            self._predictor.saw(layer, residual)

    def close(self) -> None:
        self._predictor.ignore()

    def _ask(self, guess: Guess, ranked: Sequence[int]) -> None:
        """Request those experts of a guess that are absent and worth their time on the link."""
        store, layer, distance = self._store, guess.layer, guess.distance
        num_experts, cache = store.num_experts(layer), store.tier.cache
        named = [expert for expert in ranked if expert < num_experts][: store.slots(layer)]
        earlier = queued = self._queued_bytes()
        worth = True
        for rank, expert in enumerate(named):
            if cache.slot_of(layer, expert) is not None:
                continue
            # Experts that are not requested are scored as well: otherwise a low estimate of the accuracy
            # could never recover.
            self._guessed.setdefault(layer, {})[expert] = (distance, rank)
            nbytes = store.layouts[layer][expert].nbytes
            worth = worth and self.link.worth(nbytes, queued, distance, self.accuracy.of(distance, rank))
            queued += nbytes if worth else 0
        if queued > earlier:
            budget = store.tier.bytes_in_flight + queued - earlier
            store.prefetch(layer, named, distance=distance, budget_bytes=budget)

    def _queued_bytes(self) -> int:
        """Bytes of earlier guesses whose loads are still in flight."""
        if self.link.copy_seconds is None:
            return 0
        cache, layouts = self._store.tier.cache, self._store.layouts
        return sum(
            layouts[layer][expert].nbytes
            for layer, guessed in self._guessed.items()
            for expert in guessed
            if cache.slot_of(layer, expert) is not None and not cache.is_resident(layer, expert)
        )

    def _begin_step(self, tokens: int) -> None:
        """Called at the first layer of a step: account for the step that has just ended and its time."""
        now = self._clock()
        seconds, self._began = now - self._began, now
        before, self._tokens = self._tokens, tokens
        earlier, self._tally = self._tally, self._store.tally()
        if tokens > MOST_TOKENS:
            self._look_ahead(0)
            return
        if before != tokens:  # the previous step was a prompt, or had another number of sequences
            self._look_ahead(self._pilot.lookahead)
            return
        self._since_look += 1
        self._seconds += seconds
        self._stalled += self._tally.stall_s - earlier.stall_s  # without the prompts between them
        self._missed += self._tally.misses - earlier.misses
        if self._since_look == LOOK:
            self._look()
        if self._pilot.step(seconds):
            self._publish()
        self._look_ahead(self._pilot.lookahead)

    def _look_ahead(self, lookahead: int) -> None:
        if bool(lookahead) != bool(self._lookahead):
            if lookahead:
                self._predictor.watch()
            else:
                self._predictor.ignore()
        self._lookahead = lookahead

    def _look(self) -> None:
        """Average over the last tokens: the wait per token, the time per layer, how often a layer misses."""
        tokens, layers = self._since_look, max(1, self._predictor.layers)
        self._stall_s = self._stalled / tokens
        self.link.layer_s = max(self._seconds - self._stalled, 0.0) / tokens / layers
        self.link.demand = min(1.0, self._missed / tokens / layers)
        self._since_look, self._seconds, self._stalled, self._missed = 0, 0.0, 0.0, 0

    def _promising(self) -> bool:
        """Whether correct guesses may save more waiting than guessing and the loads that it starts cost."""
        if self._predict_s is None:
            self._predict_s = self._predictor.rehearse(self._clock)
        if self._since_look:
            self._look()
        return EXPECTED * self._stall_s > ASKING * self._predict_s

    def _publish(self) -> None:
        found = self._pilot.outlook
        seconds, low, high = found.gain or (None, None, None)
        counters = self._store.tier.cache.stats
        counters.prefetch_gain = replace(
            counters.prefetch_gain,
            state=found.state,
            lookahead=found.lookahead,
            gain_ms_per_token=None if seconds is None else 1000 * seconds,
            gain_ms_low=None if low is None else 1000 * low,
            gain_ms_high=None if high is None else 1000 * high,
        )
