"""Many answers at once: each is the one it would be alone, and the queue, cancelling and failing are fair."""

from __future__ import annotations

import gc
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_local.cache.errors import BusyError, MoeLocalError, OptionError
from moe_local.offload.batcher import Batcher, Ended, Ticket
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.engine.sequence import FinishReason
from moe_local.offload.records import Token
from moe_local.offload.store.leases import Tally
from moe_local.offload.turn import Turn

torch.set_num_threads(1)
PATIENCE = 60


class Rig:
    """A batcher over a model whose experts need no store."""

    def __init__(self, hf: Any, rows: int = 2, limit: int = 4) -> None:
        self.hf = hf
        self.engine = Engine(hf, make_kv(hf, rows, 100), chunk=16)
        self.turn = Turn()
        store: Any = SimpleNamespace(tokens=0, tally=lambda: Tally(0.0, 0, 0, 0, 0))
        self.store = store
        self.batcher = Batcher(self.engine, store, self.turn, queue=limit)

    def hold(self, *answers: Heard) -> threading.Event:
        """From when each of these has a token on nobody gets another one, until the event is set.

        Steps come to nothing meanwhile; all else goes on. To be called before the answers can have begun.
        """
        step, go_on = self.engine.step, threading.Event()

        def held() -> Any:
            if go_on.is_set() or not all(one.tokens for one in answers):
                return step()
            time.sleep(0.001)
            return []

        self.engine.step = held  # type: ignore[method-assign]
        return go_on

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While somebody else has the model's turn."""
        self.turn.begin()
        try:
            yield
        finally:
            self.turn.end()

    def ask(self, prompt: list[int], count: int = 8, **options: Any) -> Heard:
        heard = Heard()
        settings = make_settings(self.hf, prompt, max_new_tokens=count, eos_token_id=None)
        heard.ticket = self.batcher.submit(prompt, settings, None, heard.listen, **options)
        return heard

    def alone(self, prompt: list[int], count: int = 8) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = self.hf.generate(ids, attention_mask=mask, max_new_tokens=count, eos_token_id=None)
        new: list[int] = out[0, len(prompt) :].tolist()
        return new


class Heard:
    """What a listener was told."""

    ticket: Ticket

    def __init__(self) -> None:
        self.events: queue.Queue[Token | Ended] = queue.Queue()
        self.ids: list[int] = []
        self.tokens = 0
        """That have come, looked at or not."""

    def listen(self, event: Token | Ended) -> None:
        self.tokens += isinstance(event, Token)
        self.events.put(event)

    def token(self) -> Token:
        event = self.events.get(timeout=PATIENCE)
        assert isinstance(event, Token)
        self.ids.append(event.id)
        return event

    def end(self) -> Ended:
        while not isinstance(event := self.events.get(timeout=PATIENCE), Ended):
            self.ids.append(event.id)
        assert self.events.empty()
        return event


@pytest.fixture
def rig(mixtral: Any) -> Iterator[Rig]:
    made = Rig(mixtral)
    yield made
    made.batcher.close()
    assert made.engine.active == []
    made.engine.check_integrity()
    assert made.batcher.running == made.batcher.waiting == 0


def test_each_answer_is_the_one_it_would_be_alone(rig: Rig) -> None:
    prompts = [[5, 6, 7], [9] * 20, [11, 3], [8, 8, 250, 4], [31]]
    heard = [rig.ask(prompt, count=6 + i) for i, prompt in enumerate(prompts)]
    for i, (prompt, one) in enumerate(zip(prompts, heard, strict=True)):
        assert one.end() == Ended(FinishReason.LENGTH)
        assert one.ids == rig.alone(prompt, 6 + i)
    assert rig.store.tokens == sum(len(one.ids) for one in heard)


def test_they_are_stepped_together(rig: Rig) -> None:
    sizes: list[int] = []

    def note(m: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))

    hook = rig.hf.register_forward_pre_hook(note, with_kwargs=True)
    with rig.paused():
        heard = [rig.ask([5, 6, i], count=20) for i in (3, 4)]
    for one in heard:
        one.end()
    hook.remove()
    assert sizes.count(2) == 18, "all but the prompts and what the first got before the second had its first"


def test_the_first_tokens_counts_are_of_all_of_its_prompt_and_of_nothing_else(rig: Rig) -> None:
    forwards: list[None] = []
    rig.store.tally = lambda: Tally(0.5 * len(forwards), len(forwards), 0, 0, 0)
    hook = rig.hf.register_forward_pre_hook(lambda *_: forwards.append(None))
    with rig.paused():
        heard = [rig.ask(prompt, count=5) for prompt in ([5], [7] * 40)]
    for one, chunks in zip(heard, (1, 3), strict=True):
        tokens = [one.token() for _ in range(5)]
        assert [token.hits for token in tokens] == [chunks, 1, 1, 1, 1]
        assert tokens[0].stall_ms == 500 * chunks
    reused = rig.ask([7] * 40, count=1)
    assert reused.token().hits == 1
    hook.remove()


def test_a_full_queue_refuses_and_recovers(rig: Rig) -> None:
    with rig.paused():
        heard = [rig.ask([5, 6, 7 + i], count=30) for i in range(6)]  # two will run, four wait
        with pytest.raises(BusyError, match="0 answers are under way and 6 wait, which is the limit"):
            rig.ask([9], count=30)
    for one in heard:
        assert one.end() == Ended(FinishReason.LENGTH)
    rig.ask([5], count=2).end()


def test_nobody_waits_for_a_prompt_to_join(rig: Rig) -> None:
    """That may copy gigabytes between rows and RAM, while the server's one thread submits others."""
    join, joining, go_on = rig.engine.join, threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        joining.set()
        assert go_on.wait(PATIENCE)
        return join(*args, **kwargs)

    rig.engine.join = slow  # type: ignore[method-assign]
    first = rig.ask([5, 6, 7])
    assert joining.wait(PATIENCE)
    others: list[Heard] = []
    asking = threading.Thread(target=lambda: others.append(rig.ask([9, 9])))
    asking.start()
    asking.join(5)
    waited = asking.is_alive()
    go_on.set()
    asking.join()
    assert not waited
    for heard, prompt in ((first, [5, 6, 7]), (others[0], [9, 9])):
        heard.end()
        assert heard.ids == rig.alone(prompt)


def test_what_waits_too_long_is_told(rig: Rig) -> None:
    with rig.paused():
        busy = [rig.ask([5, 6, 7 + i], count=20) for i in range(2)]
        go_on = rig.hold(*busy)
    late = rig.ask([9, 9], patience_s=0.0)
    ended = late.end()
    assert isinstance(ended.error, BusyError)
    assert "no turn came within" in str(ended.error)
    go_on.set()
    for one in busy:
        assert one.end().reason is FinishReason.LENGTH


def test_who_waits_for_the_models_turn_hears_of_its_end(rig: Rig) -> None:
    """While somebody else has it, as a stream may for long."""
    with rig.paused():
        late, cancelled = rig.ask([9, 9], patience_s=0.0), rig.ask([9, 8])
        patient = rig.ask([9, 7], count=3, patience_s=PATIENCE)
        cancelled.ticket.cancel()
        assert isinstance(late.end().error, BusyError)
        assert cancelled.end() == Ended(None)
        assert rig.batcher.waiting == 1
    assert patient.end() == Ended(FinishReason.LENGTH)
    assert patient.ids == rig.alone([9, 7], 3)


def test_cancelling_frees_the_row_for_who_waits(rig: Rig) -> None:
    with rig.paused():
        long = [rig.ask([5, 6, 7 + i], count=90) for i in range(2)]
        go_on = rig.hold(*long)
    waiting = rig.ask([9, 9], count=3)
    for one in long:
        one.token()
    long[0].ticket.cancel()
    go_on.set()
    assert waiting.end() == Ended(FinishReason.LENGTH)
    assert waiting.ids == rig.alone([9, 9], 3)
    assert long[0].end() == Ended(None)
    assert long[1].end() == Ended(FinishReason.LENGTH)
    assert long[1].ids == rig.alone([5, 6, 8], 90)


def test_a_listener_that_raises_is_cancelled(rig: Rig) -> None:
    def broken(event: Token | Ended) -> None:
        raise ConnectionError("gone")

    settings = make_settings(rig.hf, [5], max_new_tokens=90, eos_token_id=None)
    ticket = rig.batcher.submit([5], settings, None, broken)
    other = rig.ask([7, 7], count=20)
    assert other.end() == Ended(FinishReason.LENGTH)
    assert ticket.cancelled
    deadline = time.monotonic() + PATIENCE
    while rig.batcher.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failed_step_ends_those_in_it_and_nothing_else(rig: Rig) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = rig.hf.model.layers[1].register_forward_pre_hook(fail)
    heard = [rig.ask([5, 6, 7 + i]) for i in range(2)]
    for one in heard:
        assert "a step failed: in the middle" in str(one.end().error)
    hook.remove()
    after = rig.ask([5, 6, 7])
    assert after.end() == Ended(FinishReason.LENGTH)
    assert after.ids == rig.alone([5, 6, 7])


def test_a_failing_tokenizer_ends_its_own_answer_alone(rig: Rig) -> None:
    class Broken:
        def add(self, token: int) -> str:
            raise OverflowError("no such token")

    settings = make_settings(rig.hf, [5], max_new_tokens=20, eos_token_id=None)
    broken, detokenizer = Heard(), Broken()
    with rig.paused():
        rig.batcher.submit([5], settings, detokenizer, broken.listen)  # type: ignore[arg-type]
        other = rig.ask([7, 7], count=6)
    assert str(broken.end().error) == "a token could not be made text: no such token"
    assert other.end() == Ended(FinishReason.LENGTH)
    assert other.ids == rig.alone([7, 7], 6)


@pytest.mark.parametrize("calls", [1, 2])
def test_figures_that_cannot_be_had_end_a_step_like_any_failure(rig: Rig, calls: int) -> None:
    """A device that is gone fails where stalls are read, before the first step or behind it."""
    tally, left = rig.store.tally, [calls]

    def fail() -> Tally:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("device lost\nand more lines")
        return tally()  # type: ignore[no-any-return]

    rig.store.tally = fail
    assert str(rig.ask([5, 6, 7]).end().error) == "a step failed: device lost"
    assert rig.ask([5, 6, 7]).end() == Ended(FinishReason.LENGTH)


def test_a_prompt_that_cannot_begin_is_told_and_the_rest_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = rig.engine.join

    def picky(ids: list[int], *args: Any, **kwargs: Any) -> Any:
        if ids == [9, 9]:
            raise RuntimeError("no room")
        return join(ids, *args, **kwargs)

    monkeypatch.setattr(rig.engine, "join", picky)
    with rig.paused():
        bad, good = rig.ask([9, 9]), rig.ask([7, 7], count=4)
    assert str(bad.end().error) == "an answer could not begin: no room"
    assert good.end() == Ended(FinishReason.LENGTH)


@pytest.mark.parametrize("option", ["processors", "stops"])
def test_an_option_that_fails_in_a_step_ends_its_own_answer_alone(rig: Rig, option: str) -> None:
    def fail_behind(length: int) -> None:
        if length > 4:
            raise IndexError("index 320 is out of bounds\nand more lines")

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fail_behind(ids.shape[1])
        return scores

    settings = make_settings(rig.hf, [5], max_new_tokens=20, eos_token_id=None)
    if option == "processors":
        settings.processors = process
    else:
        settings.stops = SimpleNamespace(completed=lambda ids, *_: fail_behind(len(ids)))
    broken = Heard()
    with rig.paused():
        rig.batcher.submit([5], settings, None, broken.listen)
        other = rig.ask([7, 7], count=6)
    assert str(broken.end().error) == (
        "the options of this answer cannot be applied: index 320 is out of bounds"
    )
    assert broken.ids == rig.alone([5], len(broken.ids))
    assert len(broken.ids) == 4
    assert other.end() == Ended(FinishReason.LENGTH)
    assert other.ids == rig.alone([7, 7], 6)


def test_steps_of_a_sequence_that_is_nobodys_go_to_nobody(rig: Rig) -> None:
    with rig.paused():
        stray = rig.engine.join([8, 8], make_settings(rig.hf, [8, 8], max_new_tokens=3, eos_token_id=None))
        heard = rig.ask([7, 7], count=6)
    assert heard.end() == Ended(FinishReason.LENGTH)
    assert heard.ids == rig.alone([7, 7], 6)
    with rig.paused():
        rig.engine.leave(stray)


@pytest.mark.parametrize("method", ["_hand_out", "_admit"])
def test_a_defect_ends_all_answers_and_what_comes_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Without its thread, whoever waits would wait for ever."""

    def fail(*_: Any) -> None:
        raise SystemExit("a defect\nand more lines")

    with rig.paused():
        monkeypatch.setattr(rig.batcher, method, fail)
        heard = [rig.ask([5, 6, 7 + i]) for i in range(3)]
        look = rig.batcher.look(int)
    for one in heard:
        assert str(one.end().error) == "answering failed: a defect; load the model again"
    assert look.result(PATIENCE) == 0
    with pytest.raises(MoeLocalError, match="answering failed"):
        rig.ask([5])
    with rig.paused():
        assert rig.engine.active == []


def test_a_conversation_goes_on_where_it_was(rig: Rig) -> None:
    """Though others were answered meanwhile: each row is kept until it is needed."""
    first = rig.ask([5, 6, 7, 8, 9], count=6)
    first.end()
    other = rig.ask([200, 100], count=4)
    other.end()
    turn = [5, 6, 7, 8, 9, *first.ids, 50, 51]
    second = rig.ask(turn, count=4)
    second.end()
    assert second.ticket.reused_tokens == 5 + 5, "the last new token is not in the memory yet"
    assert second.ids == rig.alone(turn, 4)


def test_plain_calls_have_their_turn_between(rig: Rig) -> None:
    rig.ask([5], count=2).end()
    with rig.paused():
        held = rig.ask([6], count=2)
        time.sleep(0.05)
        assert held.events.empty()
    assert held.end() == Ended(FinishReason.LENGTH)


def test_bad_prompts_are_refused_at_once(rig: Rig) -> None:
    with pytest.raises(OptionError, match="the prompt is empty"):
        rig.batcher.submit([], make_settings(rig.hf, [1]), None, lambda event: None)
    with pytest.raises(OptionError, match="outside the vocabulary"):
        rig.ask([5, 320])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forks_copy_which_nobody_steps_takes_nothing(rig: Rig) -> None:
    child = os.fork()
    if child == 0:
        refused = 0
        for ask in (lambda: rig.ask([5]), lambda: rig.batcher.look(int)):
            try:
                ask()
            except Exception as error:  # none may get out of the fork
                refused += isinstance(error, MoeLocalError) and "a fork has no threads" in str(error)
        os._exit(refused)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert rig.ask([5]).end() == Ended(FinishReason.LENGTH)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forks_copy_closes_though_another_thread_had_the_lock(rig: Rig) -> None:
    with rig.batcher._changed:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            thread = threading.Thread(target=rig.batcher.close)  # whose lock it is not
            thread.start()
            thread.join()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert rig.ask([5]).end() == Ended(FinishReason.LENGTH)


def test_closing_ends_everybody(rig: Rig) -> None:
    with rig.paused():
        heard = [rig.ask([5, 6, 7 + i], count=90) for i in range(4)]
        rig.hold(*heard[:2])
    heard[0].token()
    rig.batcher.close("the model is closed")
    for one in heard:
        assert str(one.end().error) == "the model is closed"
    for ask in (lambda: rig.ask([5]), rig.batcher.stats):
        with pytest.raises(MoeLocalError, match="the model is closed"):
            ask()
    rig.batcher.close()


def test_whoever_keeps_a_closed_batcher_does_not_keep_the_model(mixtral: Any) -> None:
    rig = Rig(mixtral)
    engine, batcher = weakref.ref(rig.engine), rig.batcher
    assert rig.ask([5]).end() == Ended(FinishReason.LENGTH)
    batcher.check_integrity()
    batcher.close()
    del rig
    gc.collect()
    assert engine() is None
    assert batcher.rows == 2


@pytest.mark.parametrize("waiting", [0, 1])
def test_closing_in_the_middle_of_ones_own_answer(rig: Rig, waiting: int) -> None:
    """Whoever has the model's turn may close what waits for it."""
    with rig.paused():
        heard = [rig.ask([5, 6, 7]) for _ in range(waiting)]
        rig.batcher.close("the model is closed")
    for one in heard:
        assert str(one.end().error) == "the model is closed"


def test_what_was_cancelled_makes_room_at_once(rig: Rig) -> None:
    with rig.paused():
        heard = [rig.ask([5, 6, 7 + i], count=20) for i in range(rig.batcher.capacity)]
        with pytest.raises(BusyError):
            rig.ask([9])
        heard[3].ticket.cancel()
        extra = rig.ask([9, 9], count=3)
    assert extra.end() == Ended(FinishReason.LENGTH)
    assert heard[3].end() == Ended(None)


def test_looks_are_between_steps_of_others_and_when_idle(rig: Rig) -> None:
    stepping: list[bool] = []
    step = rig.engine.step

    def noted() -> Any:
        stepping.append(True)
        try:
            return step()
        finally:
            stepping.append(False)

    rig.engine.step = noted  # type: ignore[method-assign]
    assert rig.batcher.look(lambda: threading.current_thread().name).result(PATIENCE) == "moe-local-batcher"
    assert stepping == []
    with rig.paused():
        heard = rig.ask([5, 6, 7], count=30)
        go_on = rig.hold(heard)
    seen = []
    for _ in range(5):
        heard.token()
        seen.append(rig.batcher.look(lambda: (stepping[-1], rig.batcher.running)).result(PATIENCE))
        go_on.set()
    assert seen[0] == (False, 1)
    assert all(not within for within, _ in seen)
    assert heard.end().reason is FinishReason.LENGTH


def test_looks_that_fail_are_taken_back_or_come_too_late(rig: Rig) -> None:
    def fail() -> None:
        raise ValueError("out of sight")

    with pytest.raises(ValueError, match="out of sight"):
        rig.batcher.look(fail).result(PATIENCE)
    called: list[int] = []
    with rig.paused():
        rig.batcher.look(lambda: called.append(1)).cancel()
        last = rig.batcher.look(lambda: called.append(2))
        rig.batcher.close("enough")
    with pytest.raises(MoeLocalError, match="enough"):
        last.result(PATIENCE)
    with pytest.raises(MoeLocalError, match="enough"):
        rig.batcher.look(lambda: called.append(3))
    assert called == []
