"""What fails beside a forward: rows that cannot be freed or moved, tokens that cannot be handed out.

Nothing is lost or comes twice, and no row is used half-written.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.engine.sequence import Sequence
from support import tiny_models
from support.engine_runs import greedy

torch.set_num_threads(1)
PROMPTS = [list(range(10, 29)), list(range(50, 63)), list(range(90, 107))]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> Any:
    """One with keys and values of every token, and one with states beside them."""
    return tiny_models.tiny_model(request.param)


class Failing(TorchDispatchMode):
    """The operation number `at` finds no memory; none if that is 0."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return function(*args, **(kwargs or {}))


def fails_once(kv: Any, method: str, at: int) -> Failing:
    """The next call of a method of `kv` fails at its operation number `at`; later calls are as before."""
    plain, failing = getattr(kv, method), Failing(at)

    def fail(*args: Any) -> None:
        setattr(kv, method, plain)
        with failing:
            plain(*args)

    setattr(kv, method, fail)
    return failing


def finish(engine: Engine, sequence: Sequence) -> list[int]:
    """The new tokens of a sequence, which then leaves."""
    while sequence.finish_reason is None:
        engine.step()
        engine.check_integrity()
    engine.leave(sequence)
    return sequence.new_ids


def alone(model: Any, ids: list[int], count: int) -> list[int]:
    engine = Engine(model, make_kv(model, 1, 100), chunk=64)
    return finish(engine, engine.join(ids, greedy(model, count)))


def test_a_row_that_cannot_be_freed_stays_parked_and_empty(model: Any) -> None:
    """The last row takes the place of the freed one, and the copy fails."""
    engine = Engine(model, make_kv(model, 2, 100), chunk=64)
    first, second = (engine.join(ids, greedy(model, 4)) for ids in PROMPTS[:2])
    for sequence in (first, second):
        finish(engine, sequence)
    fails_once(engine.kv, "leave", 12)
    with pytest.raises(torch.OutOfMemoryError):
        engine.join(PROMPTS[2], greedy(model, 4), reuse=True)
    engine.check_integrity()
    assert (engine.active, engine.free_rows) == ([], 2)
    for ids, reused in ((second.ids, 16), (first.ids, 0)):
        longer = engine.join([*ids, 7, 8], greedy(model, 6), reuse=True)
        assert longer.reused_tokens == reused
        assert finish(engine, longer) == alone(model, [*ids, 7, 8], 6)
    third = engine.join(PROMPTS[2], greedy(model, 4), reuse=True)
    assert finish(engine, third) == alone(model, PROMPTS[2], 4)


def moved(model: Any, at: int, *, relieved: bool = True) -> tuple[int, list[list[int]]]:
    """Two sequences move up when a third one leaves, which fails at an operation; then the third goes on.

    Returns the number of operations of that move, and the new tokens of all.
    """
    engine = Engine(model, make_kv(model, 3, 100), chunk=64)
    engine.relief = lambda lacking: relieved
    first, *others = [engine.join(ids, greedy(model, 12)) for ids in PROMPTS]
    while len(first.new_ids) < 4:
        engine.step()
    engine.leave(first)
    failing = fails_once(engine.kv, "swap", at)
    if not relieved:
        with pytest.raises(MoeLocalError, match=r"VRAM ran out \(2.00 MiB more were asked for"):
            engine.step()
    news = [finish(engine, sequence) for sequence in others]
    longer = engine.join([*first.ids, 7, 8], greedy(model, 6), reuse=True)
    return failing.operations, [*news, finish(engine, longer)]


def test_rows_that_cannot_be_moved_are_computed_again(model: Any) -> None:
    operations, undisturbed = moved(model, 0)
    assert operations > 20
    for at in (2, operations // 2, operations):
        failed_at, news = moved(model, at, relieved=at > 2)
        assert failed_at >= at
        assert news == undisturbed


class Stops:
    """Stop strings that never come, and whose calls of these numbers fail."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        self.failures = failures
        self.calls = 0

    def completed(self, *_: Any) -> bool:
        self.calls += 1
        if self.calls in self.failures:
            raise self.failures[self.calls]
        return False


def test_tokens_that_cannot_be_handed_out_are_picked_again(model: Any) -> None:
    """The middle one of three rows, which are drawn, fails, once for want of memory, once for good."""
    runs = []
    for failures in ({}, {3: torch.OutOfMemoryError("CUDA out of memory"), 6: RuntimeError("in the middle")}):
        engine = Engine(model, make_kv(model, 3, 100), chunk=64)
        engine.relief = lambda lacking: True
        drawn = {"do_sample": True, "max_new_tokens": 9, "eos_token_id": None}
        sequences = [
            engine.join(ids, make_settings(model, [1], seed=seed, **drawn))
            for seed, ids in enumerate(PROMPTS)
        ]
        sequences[1].settings.stops = stops = Stops(failures)
        given: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        raised: list[str] = []
        while any(sequence.finish_reason is None for sequence in sequences):
            try:
                for step in engine.step():
                    given[step.sequence].append(step.token)
            except MoeLocalError as error:
                raised.append(str(error))
            engine.check_integrity()
        assert raised == ["the options of this answer cannot be applied: in the middle"][: len(failures)]
        assert stops.calls == 9 + len(failures)
        assert list(given.values()) == [sequence.new_ids for sequence in sequences]
        assert engine.tokens == 27
        for sequence in sequences:
            engine.leave(sequence)
        longer = engine.join([*sequences[2].ids, 7, 8], greedy(model, 6), reuse=True)
        runs.append([*given.values(), finish(engine, longer)])
    assert runs[0] == runs[1]


def test_a_prompt_that_is_interrupted_as_it_joins_takes_no_row(model: Any) -> None:
    """A real SIGINT between the row's beginning and the sequence's."""
    engine = Engine(model, make_kv(model, 1, 100), chunk=64)
    join = engine.kv.join

    def interrupted() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return join()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        engine.kv.join = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            engine.join(PROMPTS[0], greedy(model, 4), reuse=True)
    finally:
        signal.signal(signal.SIGINT, before)
        engine.kv.join = join  # type: ignore[method-assign]
    engine.check_integrity()
    assert (engine.active, engine.free_rows) == ([], 1)
    assert finish(engine, engine.join(PROMPTS[0], greedy(model, 4))) == alone(model, PROMPTS[0], 4)
