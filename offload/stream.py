"""An answer as it is generated: an iterator of tokens that is also their record."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from moe_local.cache.errors import MoeLocalError
from moe_local.cache.stats import Stats
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.logprobs import LogProbs
from moe_local.offload.engine.sampling import Settings
from moe_local.offload.engine.sequence import FinishReason, Sequence, Step
from moe_local.offload.engine.text import Detokenizer
from moe_local.offload.message import MessageReader
from moe_local.offload.records import GenerationStats, Output, Token
from moe_local.offload.store.leases import Tally
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.system import interrupt
from moe_local.offload.turn import Turn


class TokenStream(Iterator[Token]):
    """Generates one token per `next()`. Before the first, nothing is computed and no turn is taken.

    It is closed at its end, by `close()` in any thread, by an error or Ctrl-C in a step, and when the last
    reference to it goes; what was generated until then stays readable. `text`, `token_ids`, `finish_reason`,
    `filled_context` and `stats` are always those of the tokens handed out so far.
    """

    def __init__(
        self,
        engine: Engine,
        store: ExpertStore,
        turn: Turn,
        prompt_ids: list[int],
        settings: Settings,
        detokenizer: Detokenizer | None,
        reader: MessageReader | None = None,
    ) -> None:
        """`reader`: of its output's message."""
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[LogProbs] | None = None if settings.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.filled_context = False
        """Whether it ended because the context was full, before `max_new_tokens`."""
        self._engine = engine
        self._store = store
        self._turn = turn
        self._prompt_ids = prompt_ids
        self._settings = settings
        self._detokenizer = detokenizer
        self._reader = reader
        self._sequence: Sequence | None = None
        self._closed = False
        self._closing = False
        """Tells a thread that waits for its turn to give up."""
        self._using = threading.RLock()
        """Held while a token is made, and while it is closed."""
        self._retired: str | None = None
        self._has_turn = False
        self._tally = Tally(0.0, 0, 0, 0, 0)
        self._count: Callable[[], Stats] = Stats
        """Gives the counts from its first step until it was closed."""
        self._began = self._first = self._last = 0.0

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt, including special ones."""
        return self._prompt_ids

    @property
    def max_new_tokens(self) -> int:
        """Most tokens that the answer may have, as asked for or from the checkpoint's generation_config."""
        return self._settings.max_new_tokens

    def __next__(self) -> Token:
        mine = False
        try:
            with interrupt.deferred():
                mine = self._using.acquire(blocking=False)
                if not mine:
                    self._refuse()
                try:
                    return self._next()
                finally:
                    self._using.release()
        except BaseException:
            if mine:
                self.close()
            raise

    def _refuse(self) -> NoReturn:
        """Raise, for a thread that asks for a token while another one makes it or closes the stream."""
        self._turn.check_process()
        if self._closing and self._retired is None:
            raise StopIteration
        raise MoeLocalError(
            self._retired
            or "another thread is waiting for the next token of this stream; give each thread its own"
        )

    def _next(self) -> Token:
        if self._retired is not None:
            raise MoeLocalError(self._retired)
        if self._closed:
            raise StopIteration
        interrupt.check_imports()
        if self._sequence is not None:
            self._turn.carry_on()
        elif not self._begin():
            raise StopIteration
        step = self._step()
        interrupt.check()
        return self._token(step)

    def close(self) -> None:
        """Stop generating after the step under way, and free the model for others. Idempotent. Any thread."""
        if self._turn.lost:  # a fork's copy: whoever made a token there is gone, and never lets go of it
            return
        self._closing = True
        with self._using:
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        with interrupt.deferred():
            self._closed = True
            counts = Stats()
            try:
                if self._sequence is not None:
                    self._engine.leave(self._sequence)
                counts = self._count()
            finally:
                self._count = lambda: counts
                if self._has_turn:
                    self._turn.end()
                del self._engine, self._store  # so that a kept stream does not keep the model

    def retire(self, reason: str) -> None:
        """Close it for good: a stream that was not at its end raises MoeLocalError(reason) from now on."""
        if not self._closed:
            self._retired = reason
            # else a thread waits in it for a turn that it will not get, which closes it, too
            if self._using.acquire(blocking=False):
                try:
                    self._close()
                finally:
                    self._using.release()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():  # else nobody waits, and the modules that this needs may be gone: a default stays
            self.close()

    @property
    def stats(self) -> GenerationStats:
        """Figures of the tokens so far. Any thread."""
        return GenerationStats(
            prompt_tokens=len(self._prompt_ids),
            new_tokens=len(self.token_ids),
            ttft_s=max(0.0, self._first - self._began),
            decode_s=max(0.0, self._last - self._first),
            counts=self._count(),
        )

    def output(self) -> Output:
        """Run to the end and return the whole answer."""
        for _ in self:
            pass
        reason = self.finish_reason or FinishReason.LENGTH
        message = None
        if self._reader is not None:
            ended = bool(self.token_ids) and self.token_ids[-1] in self._settings.eos_ids
            message = self._reader.read(self.token_ids, cut=not ended)
        return Output(self.text, self.token_ids, reason, self.stats, self.logprobs, message)

    def _begin(self) -> bool:
        """Take the turn and join; False if it was closed while it waited."""
        if not self._turn.begin(lambda: self._closing):
            return False
        self._has_turn = True
        self._began = time.perf_counter()
        store, before = self._store, self._store.snapshot()
        self._count = lambda: store.snapshot() - before
        self._tally = self._store.tally()
        self._sequence = self._engine.join(self._prompt_ids, self._settings, reuse=True)
        return True

    def _step(self) -> Step:
        """The next token of this sequence, after as many forwards as the prompt needs."""
        while True:
            for step in self._engine.step():
                if step.sequence is self._sequence:
                    return step

    def _token(self, step: Step) -> Token:
        now = time.perf_counter()
        since = self._last or self._began
        self._last = now
        self._first = self._first or now
        self._store.tokens += 1
        self.token_ids.append(step.token)
        if self.logprobs is not None and step.logprobs is not None:
            self.logprobs.append(step.logprobs)
        self.finish_reason = step.finish_reason
        before, self._tally = self._tally, self._store.tally()
        new, ids = len(self.token_ids), len(step.sequence.ids)
        if step.finish_reason is FinishReason.LENGTH and new < self._settings.max_new_tokens:
            self.filled_context = ids > self._engine.kv.capacity
        token = Token.of(step, self._detokenizer, now - since, before, self._tally)
        self.text += token.text
        if step.finish_reason is not None:
            self.close()
        return token
