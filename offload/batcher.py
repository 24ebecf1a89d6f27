"""Answers to many at once: one thread steps all their sequences together, so an expert is fetched for all."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from moe_local.cache.errors import BusyError, MoeLocalError, first_line
from moe_local.cache.stats import Stats
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.logprobs import LogProbs
from moe_local.offload.engine.sampling import Settings
from moe_local.offload.engine.sequence import FinishReason, Sequence, SequenceError, Step
from moe_local.offload.engine.text import Detokenizer
from moe_local.offload.records import Token
from moe_local.offload.store.leases import NOTHING, Tally
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.turn import Turn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a listener."""

    reason: FinishReason | None
    """None: it was cancelled, or `error` says what happened."""
    error: MoeLocalError | None = None


T = TypeVar("T")
Listener = Callable[[Token | Ended], None]
"""Called with each token, and once with the end, in the batcher's thread: it must return quickly. If it
raises, its answer is cancelled."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One answer on its way. Made by `Batcher.submit`; callers read and cancel."""

    prompt_ids: list[int]
    settings: Settings
    detokenizer: Detokenizer | None
    listener: Listener
    waits_until: float | None
    """In time.monotonic's clock; None: for as long as it takes."""
    submitted: float
    cancelled: bool = False
    sequence: Sequence | None = field(default=None, repr=False)
    """None while it waits."""
    last: float = 0.0
    """When its last token came, in time.perf_counter's clock."""
    computed: int = 0
    """How many tokens of its prompt were computed, as of `prompt_tally`."""
    prompt_tally: Tally = field(default=NOTHING, repr=False)
    """Counts of all steps for its prompt but the last."""
    prompt_logprobs: list[LogProbs] = field(default_factory=list, repr=False)
    """LogProbs of the prompt's tokens but the first, if asked for; available with the first new token."""

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that an earlier answer had computed."""
        return 0 if self.sequence is None else self.sequence.reused_tokens

    def cancel(self) -> None:
        """Stop it; the listener hears Ended before the next step. Any thread; idempotent."""
        self.cancelled = True


class Batcher:
    """Answers up to `engine.kv.rows` prompts at a time; others wait in a queue of limited length.

    First come, first served. It takes the model's turn when there is something to do and gives it back when
    there is nothing, so plain calls of the model go on between. `submit` and `cancel` are for any thread.
    Whatever fails ends the answers that it concerns, with an error, and nothing else: nobody waits for ever.
    """

    def __init__(self, engine: Engine, store: ExpertStore, turn: Turn, *, queue: int) -> None:
        """`queue`: most prompts that wait beside those being answered."""
        self._engine = engine
        self._store = store
        self._turn = turn
        self.rows = engine.kv.rows
        """Most answers under way at a time."""
        self._limit = queue
        self._waiting: deque[Ticket] = deque()
        self.prompt_tokens = 0
        """Tokens of all prompts whose answers have begun."""
        self.reused_tokens = 0
        """How many of these an earlier answer had computed."""
        self.step_s = 0.0
        """Seconds spent in steps."""
        self._running: list[Ticket] = []
        self._looks: deque[Callable[[], None]] = deque()
        self._closed: str | None = None
        self._changed = threading.Condition()
        self._tally: Tally | None = None
        """As of the last step; None before the first step of a turn."""
        self._thread = threading.Thread(target=self._work, name="moe-local-batcher", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers under way."""
        return len(self._running)

    @property
    def capacity(self) -> int:
        """Most prompts that can be under way or wait at a time."""
        return self.rows + self._limit

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return len(self._waiting)

    def submit(
        self,
        prompt_ids: list[int],
        settings: Settings,
        detokenizer: Detokenizer | None,
        listener: Listener,
        *,
        patience_s: float | None = None,
    ) -> Ticket:
        """Queue a prompt. `patience_s`: how long it may wait for its first step.

        Raises BusyError where the queue is full, MoeLocalError once closed and in a fork.
        """
        self._turn.check_process()
        with self._changed:
            if self._closed is not None:
                raise MoeLocalError(self._closed)
            engine = self._engine
        engine.check_prompt(prompt_ids, settings)
        now = time.monotonic()
        until = None if patience_s is None else now + patience_s
        ticket = Ticket(prompt_ids, settings, detokenizer, listener, until, time.perf_counter())
        with self._changed:
            if self._closed is not None:
                raise MoeLocalError(self._closed)
            running, waiting = (sum(not t.cancelled for t in some) for some in (self._running, self._waiting))
            if running + waiting >= self.capacity:
                raise BusyError(
                    f"{running} answers are under way and {waiting} wait, which is the limit; try again later"
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def look(self, what: Callable[[], T]) -> Future[T]:
        """Call `what` in the batcher's thread, between two steps, for what it returns or raises.

        It is how others read the model's figures and its cache, which belong to whoever steps; it delays
        the next step, so it must be quick. Any thread. Here or in the future, MoeLocalError once closed; here
        in a fork.
        """
        self._turn.check_process()
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._closed is not None:
                    raise MoeLocalError(self._closed)
                future.set_result(what())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._closed is not None:
                raise MoeLocalError(self._closed)
            self._looks.append(call)
            self._changed.notify_all()
        return future

    def stats(self) -> Stats:
        """Counts since load. Any thread but the batcher's; waits for the end of a step."""
        return self.look(lambda: self._store.snapshot()).result()

    def close(self, reason: str = "the model answers no more") -> None:
        """Cancel everything and end the thread. Later calls of `submit` raise MoeLocalError(reason).

        In a fork, which has no such thread, it does nothing.
        """
        if self._turn.lost:  # and so may be whoever held `_changed`
            return
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless what runs is in the engine and nothing else is. While nothing steps, and
        before `close`."""
        inside = [ticket.sequence for ticket in self._running]
        if any(sequence is None for sequence in inside) or {id(s) for s in inside} != {
            id(s) for s in self._engine.active
        }:
            raise RuntimeError(f"{len(inside)} answers run, {len(self._engine.active)} are in the engine")

    def _work(self) -> None:
        while self._closed is None:
            with self._changed:
                while not self._waiting and not self._looks and self._closed is None:
                    self._changed.wait()
            try:
                if self._closed is None and self._turn.begin(self._waits_in_vain):
                    self._use_turn()
            except MoeLocalError as error:  # the model was closed
                self._closed = str(error)
        self._end_all(MoeLocalError(self._closed))
        self._answer_looks()
        with self._changed:  # whoever keeps a closed batcher need not keep the model's memory
            del self._engine, self._store

    def _use_turn(self) -> None:
        """Step until nobody waits and nothing runs, or until closed; then give the turn back."""
        try:
            self._tally = None
            while self._closed is None:
                self._answer_looks()
                if not self._admit():
                    break
                self._step()
        except BaseException as error:  # a defect of ours, and without this thread all would wait for ever
            self._closed = self._closed or f"answering failed: {first_line(error)}; load the model again"
            logger.error("answering failed, and ends", exc_info=error)
        finally:
            if self._closed is not None:
                self._end_all(MoeLocalError(self._closed))
            self._turn.end()

    def _waits_in_vain(self) -> bool:
        """Called while somebody else has the turn: whether there is no use for it any more."""
        self._end_waiting()
        # Whoever closes this may have the turn, and wait for us.
        return self._closed is not None or not (self._waiting or self._looks)

    def _admit(self) -> bool:
        """End tickets that were cancelled or waited too long, and start as many as there are rows for.

        Returns whether any are running."""
        for ticket in [ticket for ticket in self._running if ticket.cancelled]:
            self._end(ticket, Ended(None))
        self._end_waiting()
        while self._waiting and self._engine.free_rows:
            self._start(self._waiting[0])  # without the lock: it may copy gigabytes, while others submit
        return bool(self._running)

    def _end_waiting(self) -> None:
        """End tickets in the queue that were cancelled or waited too long."""
        now = time.monotonic()
        with self._changed:
            for ticket in [*self._waiting]:
                late = ticket.waits_until is not None and now > ticket.waits_until
                if not (ticket.cancelled or late):
                    continue
                self._waiting.remove(ticket)
                if ticket.cancelled:
                    self._tell(ticket, Ended(None))
                    continue
                seconds = time.perf_counter() - ticket.submitted
                error = BusyError(f"no turn came within {seconds:.0f} s; try again later")
                self._tell(ticket, Ended(None, error))

    def _start(self, ticket: Ticket) -> None:
        """Start the first ticket in the queue, from which only this thread takes any."""
        failure = None
        try:
            ticket.sequence = self._engine.join(ticket.prompt_ids, ticket.settings, reuse=True)
            ticket.computed = self._engine.kv.lens[ticket.sequence.row]
            ticket.last = ticket.submitted
        except Exception as error:
            failure = Ended(None, _as_ours(error, "an answer could not begin"))
        with self._changed:
            self._waiting.popleft()
            if failure is None:
                self._running.append(ticket)
            self._changed.notify_all()
        if failure is not None:
            self._tell(ticket, failure)

    def _answer_looks(self) -> None:
        for _ in range(len(self._looks)):  # calls added meanwhile wait for the next step
            self._looks.popleft()()

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            before = self._store.tally() if self._tally is None else self._tally
            steps = self._engine.step()
            after = self._tally = self._store.tally()
        except Exception as error:
            self._tally = None
            failure = Ended(None, _as_ours(error, "a step failed"))
            guilty = error.sequence if isinstance(error, SequenceError) else None
            for ticket in [*self._running]:
                if guilty is None or ticket.sequence is guilty:  # None: whose fault it was is not known
                    self._end(ticket, failure)
            return
        self.step_s += time.perf_counter() - began
        self._store.tokens += len(steps)
        if not steps:
            self._count_prompt(before, after)
        mine = {id(ticket.sequence): ticket for ticket in self._running}
        for step in steps:
            owner = mine.get(id(step.sequence))
            if owner is None:  # a sequence that somebody else left in the engine
                continue
            try:
                self._hand_out(owner, step, before, after)
            except Exception as error:  # of a tokenizer, for one
                self._end(owner, Ended(None, _as_ours(error, "a token could not be made text")))

    def _count_prompt(self, before: Tally, after: Tally) -> None:
        """Count a step without new tokens for the answer whose prompt it computed a part of."""
        for ticket in self._running:
            sequence = ticket.sequence
            assert sequence is not None
            computed = self._engine.kv.lens[sequence.row]
            if len(sequence.ids) == sequence.prompt_len and computed != ticket.computed:
                ticket.computed = computed
                ticket.prompt_tally = ticket.prompt_tally.plus(after.minus(before))

    def _hand_out(self, ticket: Ticket, step: Step, before: Tally, after: Tally) -> None:
        now = time.perf_counter()
        if len(step.sequence.ids) == step.sequence.prompt_len + 1:
            self.prompt_tokens += step.sequence.prompt_len
            self.reused_tokens += step.sequence.reused_tokens
            ticket.prompt_logprobs = step.sequence.prompt_logprobs
            before = before.minus(ticket.prompt_tally)
        token = Token.of(step, ticket.detokenizer, now - ticket.last, before, after)
        ticket.last = now
        self._tell(ticket, token)
        if step.finish_reason is not None:
            self._end(ticket, Ended(step.finish_reason))

    def _end(self, ticket: Ticket, ended: Ended) -> None:
        """Remove a ticket's sequence from the engine, and send the last event to its listener."""
        assert ticket.sequence is not None
        try:
            self._engine.leave(ticket.sequence)
        finally:
            with self._changed:
                self._running.remove(ticket)
                self._changed.notify_all()
            self._tell(ticket, ended)

    def _end_all(self, error: MoeLocalError) -> None:
        """End whatever runs or waits, also where the engine's own bookkeeping fails."""
        while self._running:
            with contextlib.suppress(Exception):
                self._end(self._running[0], Ended(None, error))
        with self._changed:
            left, self._waiting = self._waiting, deque()
        for ticket in left:
            self._tell(ticket, Ended(None, error))

    def _tell(self, ticket: Ticket, event: Token | Ended) -> None:
        try:
            ticket.listener(event)
        except BaseException:  # the other end is gone
            ticket.cancel()


def _as_ours(error: Exception, what: str) -> MoeLocalError:
    """The error in the form that listeners get: a MoeLocalError of one line."""
    return error if isinstance(error, MoeLocalError) else MoeLocalError(f"{what}: {first_line(error)}")
