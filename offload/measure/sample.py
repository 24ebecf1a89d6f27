"""One run of a workload: when each token came, and what the store counted meanwhile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_local.cache.stats import Stats
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.engine.sequence import Sequence as Running
from moe_local.offload.model import Model

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
"""Options for repeatable answers that never end before they have all tokens that were asked for."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine, or all steps up to a first token. `counts` lacks the table of routed tokens."""

    ms: float
    counts: Stats
    tokens: int = 1
    """How many tokens it produced."""


Watcher = Callable[[Step], None]
"""Called between steps, outside the time that is measured."""


@dataclass(slots=True)
class Sample:
    """One run of a workload: one answer or several."""

    prompt_tokens: int = 0
    """Prompt tokens that were computed, without those reused from earlier in a conversation."""
    ttft_s: list[float] = field(default_factory=list)
    """Time to first token: from the call to the first new token, of each answer."""
    prefill_s: float = 0.0
    """Time in which only prompts were computed."""
    tpot_ms: list[float] = field(default_factory=list)
    """Time per output token: from each new token of an answer to its next."""
    decode: list[Step] = field(default_factory=list)
    """Every step after an answer's first token."""
    ids: list[tuple[int, ...]] = field(default_factory=list)
    """New ids of each answer."""

    @property
    def decode_tokens(self) -> int:
        return sum(step.tokens for step in self.decode)

    @property
    def decode_s(self) -> float:
        return sum(step.ms for step in self.decode) / 1000


class Taker:
    """Runs prompts on a model and collects the figures in a Sample."""

    def __init__(
        self,
        model: Model,
        tokens: int,
        *,
        answering: Callable[[], None] | None = None,
        before: Callable[[], None] | None = None,
        after: Watcher | None = None,
    ) -> None:
        """`tokens`: new ids of each answer, at least two, greedily; only the context can end it earlier.

        Outside the measured time, `answering` is called by `answer` before it begins, `before` before each
        decode step (`answer_together`: before each step) and `after` after every step.
        """
        self.sample = Sample()
        self._model = model
        self._tokens = tokens
        self._answering = answering
        self._before = before
        self._after = after
        self._store = model.parts.store

    def answer(self, prompt: Sequence[int]) -> str:
        """Answer one prompt; returns the text."""
        options: dict[str, Any] = {"max_new_tokens": self._tokens, **GREEDY}
        sample = self.sample
        if self._answering is not None:
            self._answering()
        with self._model.stream(list(prompt), **options) as stream:
            first = self._timed(lambda: next(stream))
            sample.ttft_s.append(first.ms / 1000)
            sample.prefill_s += first.ms / 1000
            reused = sum(sequence.reused_tokens for sequence in self._model.parts.engine.active)
            sample.prompt_tokens += len(prompt) - reused
            while stream.finish_reason is None:
                if self._before is not None:
                    self._before()
                step = self._timed(lambda: next(stream))
                sample.decode.append(step)
                sample.tpot_ms.append(step.ms)
        sample.ids.append(tuple(stream.token_ids))
        return stream.text

    def answer_together(self, prompts: Sequence[Sequence[int]]) -> None:
        """Answer several prompts together, as many at a time as the engine has rows."""
        engine, start = self._model.parts.engine, time.perf_counter()
        waiting = deque(prompts)
        running: dict[Running, float] = {}  # when each last got a token
        ids: dict[Running, tuple[int, ...]] = {}
        try:
            while waiting or running:
                while waiting and engine.free_rows:
                    sequence = self._join(waiting.popleft())
                    running[sequence] = start
                    ids[sequence] = ()
                self._step_together(running)
                for sequence in [s for s in running if s.finish_reason is not None]:
                    del running[sequence]
                    engine.leave(sequence)
                    ids[sequence] = tuple(sequence.new_ids)
        finally:
            for sequence in running:
                engine.leave(sequence)
        self.sample.ids += ids.values()

    def _join(self, prompt: Sequence[int]) -> Running:
        engine = self._model.parts.engine
        options: dict[str, Any] = {"max_new_tokens": self._tokens, **GREEDY}
        self.sample.prompt_tokens += len(prompt)
        return engine.join(list(prompt), make_settings(engine.hf, list(prompt), **options))

    def _step_together(self, running: dict[Running, float]) -> None:
        engine, sample = self._model.parts.engine, self.sample
        if self._before is not None:
            self._before()
        emitted: list[Running] = []
        step = self._timed(lambda: emitted.extend(each.sequence for each in engine.step()))
        now = time.perf_counter()
        self._store.tokens += len(emitted)
        later = [sequence for sequence in emitted if len(sequence.new_ids) > 1]
        for sequence in emitted:
            if sequence not in later:
                sample.ttft_s.append(now - running[sequence])
            else:
                sample.tpot_ms.append(1000 * (now - running[sequence]))
            running[sequence] = now
        if later:
            sample.decode.append(Step(step.ms, step.counts, len(emitted)))
        else:
            sample.prefill_s += step.ms / 1000

    def _timed(self, work: Callable[[], object]) -> Step:
        counts = self._store.snapshot(routed=False)
        start = time.perf_counter()
        work()
        ms = 1000 * (time.perf_counter() - start)
        step = Step(ms, self._store.snapshot(routed=False) - counts)
        if self._after is not None:
            self._after(step)
        return step
