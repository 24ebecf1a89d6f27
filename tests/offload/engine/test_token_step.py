"""Tokens replayed from graphs against computed ones, on a device that records torch's operations."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.engine import static_row
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.kv_slab import KVSlab
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.static_row import static_columns
from moe_local.offload.gpu.relief import Shortage
from moe_local.offload.modeling.masks import use_capturable_mask
from support import engine_runs, fake_graphs, plain_experts, tiny_models
from support.engine_runs import finish, greedy, random_ids

torch.set_num_threads(1)

TOLERANCE = 2e-4
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral-window": {"sliding_window": 8},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 8},
    "olmoe": {},
    "deepseek_v3": {},
    "qwen3_next": {},
    "granitemoehybrid": {},
    "lfm2_moe": {},
}


SLOW = {"granitemoehybrid", "lfm2_moe"}


@pytest.fixture(
    scope="module", params=[pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES]
)
def model(request: pytest.FixtureRequest) -> Any:
    hf = tiny_models.tiny_model(request.param.split("-")[0], **CASES[request.param])
    use_capturable_mask(hf)  # as a trial of graphs does
    return plain_experts.offloaded(hf)


@pytest.fixture
def mixtral() -> Any:
    return plain_experts.offloaded(tiny_models.tiny_model("mixtral", num_hidden_layers=2))


@pytest.fixture(params=["mixtral", pytest.param("qwen3_next", id="with states", marks=pytest.mark.slow)])
def either(request: pytest.FixtureRequest) -> Any:
    options = {"num_hidden_layers": 2} if request.param == "mixtral" else {}
    return plain_experts.offloaded(tiny_models.tiny_model(request.param, **options))


@pytest.fixture(autouse=True)
def few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_row, "FEWEST_COLUMNS", 16)
    monkeypatch.setattr("moe_local.offload.engine.kv_slab.SWAPPED", 5)


class Watched(Engine):
    """Keeps the logits of every forward."""

    def __init__(self, model: Any, kv: Any, *, graphs: Any = None, static: bool = True) -> None:
        super().__init__(model, kv, chunk=8)
        self.seen: list[torch.Tensor] = []
        if static:
            self.token_step = self.make_token_step(graphs)

    def _forward(self, work: Any) -> torch.Tensor:
        logits = super()._forward(work)
        self.seen.append(logits.clone())
        return logits


def decoded(engine: Watched, ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    sequence = engine.join(ids, greedy(engine.hf, count))
    finish(engine, sequence)
    engine.leave(sequence)
    return sequence.new_ids, torch.cat(engine.seen)


def check_three_ways(model: Any, graphs: Any, count: int) -> None:
    """Replayed tokens have the bits of computed ones, and the ids of plain ones, whose logits are close."""
    ids, capacity = random_ids(12), 12 + count
    plain_ids, plain = decoded(Watched(model, make_kv(model, 1, capacity), static=False), ids, count)
    static_ids, static = decoded(Watched(model, make_kv(model, 1, capacity)), ids, count)
    engine = Watched(model, make_kv(model, 1, capacity), graphs=graphs)
    model.runner.calls.clear()
    graph_ids, graph = decoded(engine, ids, count)
    assert graph_ids == static_ids == plain_ids
    assert torch.equal(graph, static)
    torch.testing.assert_close(graph, plain, rtol=0, atol=TOLERANCE)
    layers = len(set(model.runner.calls))
    assert model.runner.calls == list(range(layers)) * (1 + count)  # two prompt chunks, count - 1 tokens
    assert engine.token_step is not None
    captured = engine.token_step.captured
    assert {place[1] for place in captured} == {static_columns(12 + n, capacity) for n in range(2, count - 1)}
    assert all(step.segments == layers + 1 for step in captured.values())


def test_replayed_computed_and_plain_tokens(model: Any) -> None:
    check_three_ways(model, fake_graphs.FakeGraphs(), 24)


@pytest.mark.slow
def test_hundreds_of_tokens(model: Any) -> None:
    takes_long = type(make_kv(model, 1, 16)) is not KVSlab
    check_three_ways(model, fake_graphs.FakeGraphs(), 150 if takes_long else 600)


def test_bf16() -> None:
    """Replayed tokens keep the bits of computed ones; plain ones differ by bf16's rounding."""
    hf = plain_experts.offloaded(tiny_models.tiny_model("qwen3_moe").to(torch.bfloat16))
    ids = random_ids(24)
    found = []
    for graphs, static in ((None, False), (None, True), (fake_graphs.FakeGraphs(), True)):
        engine = Watched(hf, make_kv(hf, 1, 25), graphs=graphs, static=static)
        row = engine.kv.join()
        with torch.inference_mode():
            for token in ids:
                step = engine.token_step
                logits = engine.plain_logits(row, [token]) if step is None else step.logits(row, token)
                engine.seen.append(logits.clone())
                engine.kv.advance(row, 1)
        found.append(torch.cat(engine.seen))
    plain, static_logits, graph = found
    assert torch.equal(graph, static_logits)
    off = (graph - plain).norm(dim=1) / plain.norm(dim=1)
    assert off.median() < 0.03


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
def test_joining_leaving_and_reuse_change_nobody(either: Any, seed: int) -> None:
    """Rows move into holes, are shortened and taken over; each has graphs of its own."""
    chance = random.Random(seed)
    graphs = fake_graphs.FakeGraphs()
    engine = Watched(either, make_kv(either, 3, 48), graphs=graphs)
    engine.kv.can_batch = False  # each token by itself, in turn: only those are captured
    common = random_ids(9, seed)
    waiting = [
        [*common[: chance.randrange(9)], *random_ids(chance.randint(1, 9), seed + n)] for n in range(6)
    ]
    done = engine_runs.answered_at_random(engine, waiting, chance, most=16)
    assert graphs.replays > graphs.captures > 0
    engine_runs.check_alone(either, done)


def test_conversations_one_after_the_other_share_graphs(either: Any) -> None:
    """Each begins in a row of its own, and there is no graph for every row."""
    engine = Watched(either, make_kv(either, 3, 32), graphs=fake_graphs.FakeGraphs())
    alone = Watched(either, make_kv(either, 1, 32))
    assert engine.token_step is not None
    for seed in range(4):
        assert decoded(engine, random_ids(12, seed), 8)[0] == decoded(alone, random_ids(12, seed), 8)[0]
        engine.check_integrity()
        assert engine.token_step.captured.keys() == {(0, 16), (0, 24)}


@pytest.mark.parametrize("error", [MoeLocalError, KeyboardInterrupt])
def test_errors_of_experts_leave_everybody_as_they_were(mixtral: Any, error: type[BaseException]) -> None:
    """In the first layer and in the second, of tokens that are computed, captured and replayed."""
    ids = random_ids(5)
    want, _ = decoded(Watched(mixtral, make_kv(mixtral, 1, 64), static=False), ids, 20)
    engine = Watched(mixtral, make_kv(mixtral, 1, 64), graphs=fake_graphs.FakeGraphs())
    sequence = engine.join(ids, greedy(mixtral, 20))
    mixtral.runner.error = error
    while sequence.finish_reason is None:
        for layer in (0, 1):
            before = list(sequence.ids), list(engine.kv.lens)
            mixtral.runner.fail_in = layer
            with pytest.raises(error):
                engine.step()
            engine.check_integrity()
            assert before == (sequence.ids, engine.kv.lens)
            assert all(module.seam is None for module in mixtral.modules() if hasattr(module, "seam"))
        engine.step()
    assert sequence.new_ids == want
    assert engine.token_step is not None
    assert engine.token_step.failure is None
    assert engine.token_step.captured


def test_what_has_never_been_computed_whole_is_not_captured(mixtral: Any) -> None:
    """A first token that failed has not loaded all kernels, which a capture cannot do."""
    graphs = fake_graphs.FakeGraphs()
    engine = Watched(mixtral, make_kv(mixtral, 1, 64), graphs=graphs)
    engine.join(random_ids(5), greedy(mixtral, 20))
    engine.step()
    mixtral.runner.fail_in = 1
    with pytest.raises(MoeLocalError):
        engine.step()
    engine.step()
    assert graphs.captures == 0
    engine.step()
    assert graphs.captures == 3


def test_a_token_that_failed_has_spoiled_states_which_are_computed_again() -> None:
    """In whichever layer, of tokens that are computed, captured and replayed."""
    hf = plain_experts.offloaded(tiny_models.tiny_model("qwen3_next"))
    want, _ = decoded(Watched(hf, make_kv(hf, 1, 64), static=False), random_ids(5), 8)
    engine = Watched(hf, make_kv(hf, 1, 64), graphs=fake_graphs.FakeGraphs())
    sequence = engine.join(random_ids(5), greedy(hf, 8))
    for number in range(8):
        count = len(sequence.ids)
        if number % 2:  # one that is computed, one that is captured, and two that are replayed
            hf.runner.fail_in = number // 2
            with pytest.raises(MoeLocalError):
                engine.step()
            assert engine.kv.lens == [0]
        while len(sequence.ids) == count:
            engine.step()
    assert sequence.new_ids == want
    assert engine.token_step is not None
    assert engine.token_step.captured


def test_a_capture_that_is_refused_costs_no_token(either: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever segment it is; earlier graphs go on, and it is said once."""
    caplog.set_level("INFO", "moe_local")
    want, logits = decoded(Watched(either, make_kv(either, 1, 64)), random_ids(5), 24)
    segments = len(set(either.runner.calls)) + 1
    for fail_at in (0, 1, segments + 2):
        caplog.clear()
        engine = Watched(either, make_kv(either, 1, 64), graphs=fake_graphs.FakeGraphs(fail_at))
        got, seen = decoded(engine, random_ids(5), 24)
        assert got == want
        assert torch.equal(seen, logits)
        assert engine.token_step is not None
        assert (engine.token_step.failure or "").startswith("RuntimeError: CUDA error: operation failed")
        assert len(engine.token_step.captured) == fail_at // segments
        assert len(caplog.records) == (fail_at >= segments)


@pytest.mark.parametrize(
    ("room", "lacks"),
    [
        *((room, "end") for room in (0, 1, 2, 4)),
        *((1, lacks) for lacks in ("begin", "result", "replay", "experts")),
    ],
)
def test_a_capture_without_memory_goes_on_once_something_gave_way(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch, room: int, lacks: str
) -> None:
    """Wherever it lacks, also for experts between two captures."""
    want, logits = decoded(Watched(mixtral, make_kv(mixtral, 1, 64)), random_ids(5), 24)
    graphs = fake_graphs.FakeGraphs(room=room, lacks=lacks)
    run = mixtral.runner.run

    def watched(*arguments: Any) -> Any:
        graphs.refuse("experts")
        return run(*arguments)

    monkeypatch.setattr(mixtral.runner, "run", watched)
    engine = Watched(mixtral, make_kv(mixtral, 1, 64), graphs=graphs)

    def relief(lacking: Shortage) -> bool:
        graphs.room = None if graphs.refusals == 2 else graphs.captures  # the first does not suffice
        return True

    engine.relief = relief
    got, seen = decoded(engine, random_ids(5), 24)
    assert got == want
    assert torch.equal(seen, logits)
    assert graphs.refusals == 2
    assert engine.token_step is not None
    assert engine.token_step.failure is None
    assert engine.token_step.captures
    assert len(engine.token_step.captured) == 3


@pytest.mark.parametrize("relief", [None, lambda lacking: False])
def test_without_memory_for_graphs_tokens_are_computed(
    mixtral: Any, relief: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever segment lacks it, and what had been captured goes, too."""
    want, logits = decoded(Watched(mixtral, make_kv(mixtral, 1, 64)), random_ids(5), 24)
    for room in (0, 1, 5):
        caplog.clear()
        graphs = fake_graphs.FakeGraphs(room=room)
        engine = Watched(mixtral, make_kv(mixtral, 1, 64), graphs=graphs)
        engine.relief = relief
        got, seen = decoded(engine, random_ids(5), 24)
        assert got == want
        assert torch.equal(seen, logits)
        assert graphs.refusals == 1
        assert engine.token_step is not None
        assert not engine.token_step.captures
        assert not engine.token_step.captured
        assert [record.message for record in caplog.records] == [
            "VRAM ran out: tokens are computed without CUDA graphs from now on"
        ]


def test_a_forward_that_waits_for_the_device_is_not_captured(mixtral: Any) -> None:
    want, _ = decoded(Watched(mixtral, make_kv(mixtral, 1, 64), static=False), random_ids(5), 20)
    hook = mixtral.model.norm.register_forward_hook(lambda module, args, output: output.sum().item() and None)
    engine = Watched(mixtral, make_kv(mixtral, 1, 64), graphs=fake_graphs.FakeGraphs())
    assert decoded(engine, random_ids(5), 20)[0] == want
    hook.remove()
    assert engine.token_step is not None
    assert "item" in (engine.token_step.failure or "")


def test_nan_in_columns_behind_a_row_reaches_nobody(mixtral: Any) -> None:
    """Neither from memory never written, nor from a forward that failed, nor from a sequence that left."""
    want, _ = decoded(Watched(mixtral, make_kv(mixtral, 1, 64), static=False), random_ids(5), 20)
    kv = make_kv(mixtral, 2, 64)
    assert isinstance(kv, KVSlab)
    for store in kv.layers:
        assert store is not None
        store.keys.fill_(torch.nan)
        store.values.fill_(torch.nan)
    engine = Watched(mixtral, kv, graphs=fake_graphs.FakeGraphs())
    for reuse in (False, True, True):
        sequence = engine.join(random_ids(5), greedy(mixtral, 20), reuse=reuse)
        finish(engine, sequence)
        assert sequence.new_ids == want
        engine.leave(sequence)
        for store in kv.layers:  # as if its later tokens had come to NaN
            assert store is not None
            store.keys[0, :, 7 : kv.lens[0]] = torch.nan
    engine.forget()
    broken = engine.join(random_ids(40, 1), greedy(mixtral, 20))
    for _ in range(4):
        engine.step()
    mixtral.runner.fail_in = 1
    with pytest.raises(MoeLocalError):
        engine.step()
    assert kv.lens == [32]
    for store in kv.layers:  # what it left behind its length, beyond all that was written before
        assert store is not None
        store.values[broken.row, :, 32:40] = torch.nan
    engine.leave(broken)
    engine.forget()
    sequence = engine.join(random_ids(5), greedy(mixtral, 30))
    assert sequence.row == 0
    finish(engine, sequence)
    assert sequence.new_ids[:20] == want
    assert len(sequence.new_ids) == 30


def test_columns_depend_on_the_length_alone_and_waste_half_at_most() -> None:
    static_row.FEWEST_COLUMNS = 256
    for capacity in (100, 300, 5000, 1 << 17):
        before = 0
        for length in range(1, min(capacity, 5000) + 1):
            columns = static_columns(length, capacity)
            assert length <= columns <= capacity
            assert columns >= before
            assert columns <= max(256, 1.5 * length)
            before = columns
    assert static_columns(257, 10**6) == 384
    assert static_columns(385, 10**6) == 512
    assert len({static_columns(length, 10**6) for length in range(1, 10**5, 7)}) < 20


def test_nothing_outlives_the_engine(mixtral: Any) -> None:
    """No cycle keeps graphs and their memory until a collection of garbage."""
    graphs = fake_graphs.FakeGraphs()
    engine = Watched(mixtral, make_kv(mixtral, 1, 64), graphs=graphs)
    decoded(engine, random_ids(5), 20)
    assert engine.token_step is not None
    watched = [weakref.ref(step) for step in engine.token_step.captured.values()]
    assert watched
    gc.disable()
    try:
        del engine
        assert all(ref() is None for ref in watched)
    finally:
        gc.enable()
