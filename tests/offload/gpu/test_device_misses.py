"""Misses that the device looks up and brings by itself, against the host that does; Triton stood in for."""

from __future__ import annotations

import gc
import logging
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.offload.engine import miss_trial
from moe_local.offload.engine.miss_trial import VARIABLE, miss_mode
from moe_local.offload.gpu.device_misses import DeviceMisses
from moe_local.offload.gpu.relief import Shortage
from moe_local.offload.measure.variants import expert_runner
from support import fake_graphs, torch_kernels
from support.engine_runs import random_ids

torch.set_num_threads(1)

EXPERTS, SLOTS = 8, 3


@pytest.fixture(autouse=True)
def make_device(make_device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Of devices that compute single tokens with torch's kernels, from graphs; trials at load are short."""
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", "on")
    torch_kernels.use(monkeypatch)
    monkeypatch.setattr(miss_trial, "PATTERN", (0, 1, 0))
    monkeypatch.setattr(miss_trial, "ROUNDS", 1)
    monkeypatch.setattr(
        "moe_local.offload.kernels.fetch.fetch_kernels", lambda device: torch_kernels.TorchFetch()
    )
    return torch_kernels.devices(make_device)


@pytest.fixture
def load() -> Callable[..., moe_local.Model]:
    """load(folder, device, graphs, mode="on", slots=3, ...) -> a model; `mode` is for VARIABLE."""

    def loaded(folder: Path, device: Any, graphs: Any, mode: str = "on", **options: Any) -> moe_local.Model:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, mode)
            given = {"slots": SLOTS, "context": 128, "prefetch": "off"} | options
            model: moe_local.Model = torch_kernels.load(folder, device, graphs, **given)
            return model

    return loaded


def answer(model: moe_local.Model, length: int = 11, new: int = 12, seed: int = 0) -> list[int]:
    ids = model.generate(random_ids(length, seed), max_new_tokens=new, eos_token_id=None).token_ids
    model.check_integrity()
    return ids


FAMILIES = [
    "qwen3_moe",
    *(pytest.param(t, marks=pytest.mark.slow) for t in ("mixtral", "gpt_oss", "deepseek_v3")),
]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_ids_and_counts_as_with_the_host(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    model_type: str,
) -> None:
    """From one graph a token, with fewer slots than experts; and again when the host has been at it."""
    folder = make_checkpoint(model_type)
    with load(folder, make_device(1), None, "off", slots=EXPERTS) as model:
        want = answer(model) + answer(model, seed=1)
    with load(folder, make_device(2), fake_graphs.FakeGraphs(), "off") as model:
        assert answer(model) + answer(model, seed=1) == want
        by_host = model.stats()
    device, graphs = make_device(3), fake_graphs.FakeGraphs()
    with load(folder, device, graphs) as model:
        step = model.parts.engine.token_step
        assert step is not None
        assert [captured.segments for captured in step.captured.values()] == [1]
        stats = model.stats()
        assert (
            stats.hits == stats.misses == stats.evictions == stats.bytes.h2d == sum(stats.routed.tokens) == 0
        )
        assert stats.stall.total == 0
        captures = graphs.captures
        assert answer(model) + answer(model, seed=1) == want
        assert graphs.captures == captures
        assert device.copies > 0  # the prompt's
        stats = model.stats()
        assert stats.routed == by_host.routed
        assert stats.hits + stats.misses == by_host.hits + by_host.misses
        assert abs(stats.misses - by_host.misses) <= 0.05 * by_host.misses
        assert stats.bytes.h2d > 0
        assert stats.stall.demand > 0


def test_each_token_is_counted_when_it_comes(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
) -> None:
    """What a stream says of a token is that token's, though the cache hears of it one token later."""
    device = make_device(4)
    with load(make_checkpoint("qwen3_moe"), device, fake_graphs.FakeGraphs()) as model:
        layers = len(model.stats().hits_by_layer)
        first, *tokens = model.stream(random_ids(9), max_new_tokens=20, eos_token_id=None)
        assert first.hits + first.misses > 2 * layers
        assert [token.hits + token.misses for token in tokens] == [2 * layers] * 19
        nbytes = {token.bytes_h2d / token.misses for token in tokens if token.misses}
        assert nbytes == {model.parts.store.layouts[0][0].nbytes}
        stall = {round(token.stall_ms / token.misses, 9) for token in tokens if token.misses}
        assert stall == {1e-3}
        assert all(token.stall_ms == 0 for token in tokens if not token.misses)
        # a few tokens later the same ones are all hits
        assert 0 < sum(token.misses for token in tokens) < 19 * 2 * layers
        view = model.cache_view()
        model.check_integrity()
        view.look(model.stats().routed.counts)


@pytest.mark.slow
def test_another_thread_may_look_while_a_token_is_computed(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slots stay the device's, which goes on to fill them; what the other sees is the token before."""
    with load(make_checkpoint("qwen3_moe"), make_device(8), fake_graphs.FakeGraphs()) as model:
        want = answer(model)
        step, stats = model.parts.engine.token_step, list[Any]()
        assert step is not None
        compute = step._logits

        def watched(place: tuple[int, int]) -> torch.Tensor:
            thread = threading.Thread(target=lambda: stats.append(model.stats()))
            thread.start()
            thread.join(100)
            return compute(place)

        monkeypatch.setattr(step, "_logits", watched)
        assert answer(model) == want
        seen = [one.hits + one.misses for one in stats]
        assert len(seen) == 12  # the last token of the prompt, too: the row has the others
        assert seen == sorted(seen)
        assert seen[-1] < model.stats().hits + model.stats().misses


@pytest.mark.slow
def test_the_host_may_come_between_at_any_time(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts, steps of several rows, transformers' own generate, an empty cache, fewer slots, an error amid
    a token: the ids stay those of a model that is all resident."""
    folder, rng = make_checkpoint("qwen3_moe"), random.Random(0)
    with load(folder, make_device(5), None, "off", slots=EXPERTS) as model:
        want = [answer(model, length, 10, length) for length in (5, 40, 12)]
    graphs = fake_graphs.FakeGraphs()
    with load(folder, make_device(6), graphs, slots=5) as model:
        parts, failures = model.parts, 0
        run = DeviceMisses.run

        def failing(self: DeviceMisses, number: int, *arguments: Any) -> Any:
            nonlocal failures
            if failures:
                failures -= 1
                raise MoeLocalError("in the middle")
            return run(self, number, *arguments)

        monkeypatch.setattr(DeviceMisses, "run", failing)
        for _ in range(2):
            for length, ids in zip((5, 40, 12), want, strict=True):
                got: list[int] = []
                for token in model.stream(random_ids(length, length), max_new_tokens=10, eos_token_id=None):
                    got.append(token.id)
                    event = rng.random()
                    if event < 0.1:
                        parts.store.empty()
                    elif event < 0.2:
                        parts.store.snapshot()
                    elif event < 0.3:
                        model.check_integrity()
                assert got == ids
            given = torch.tensor([random_ids(5, 5), random_ids(5, 5)])
            both = model.generate(given, max_new_tokens=10, eos_token_id=None)
            assert both[:, 5:].tolist() == [want[0]] * 2
            alone = model.hf.generate(given[:1], max_new_tokens=10, eos_token_id=None, do_sample=False)
            assert alone[0, 5:].tolist() == want[0]
            # an error while a token is computed without a graph, and the next answer
            step = parts.engine.token_step
            assert step is not None
            step.captured.clear()
            step._caches.clear()
            failures = 1
            with pytest.raises(MoeLocalError, match="in the middle"):
                answer(model, 5, 10, 5)
            model.check_integrity()
            # memory runs out: the experts give way
            assert parts.engine.relief is not None
            before = parts.store.slots(0)
            monkeypatch.setattr("moe_local.offload.gpu.relief.MARGIN", 1)
            parts.engine.relief(Shortage(1, None))
            assert parts.store.slots(0) <= before
            model.check_integrity()
        assert answer(model, 5, 10, 5) == want[0]
        assert isinstance(parts.store.custody, DeviceMisses)
    with pytest.raises(MoeLocalError, match="closed"):
        answer(model)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "policy"), [("qwen3_moe", "adaptive"), ("gpt_oss", "lru")])
def test_hundreds_of_tokens(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    model_type: str,
    policy: str,
) -> None:
    """Several topics, each a prompt and a long answer."""
    folder = make_checkpoint(model_type)
    found = []
    for mode in ("off", "on"):
        with load(folder, make_device(7), fake_graphs.FakeGraphs(), mode, policy=policy) as model:
            ids = [answer(model, 20 + seed, 70, seed) for seed in range(3)]
            found.append((ids, model.stats()))
    (want, by_host), (ids, stats) = found
    assert ids == want
    assert stats.routed == by_host.routed
    assert stats.misses <= 1.05 * by_host.misses


def test_experts_whose_copy_was_never_launched_are_absent(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The look-up of a layer has logged them when VRAM runs out before their copies: the step that is run
    again must not take the slots' old bytes for them."""
    folder, lacking = make_checkpoint("qwen3_moe"), iter([False] * 3)

    class Lacking(torch_kernels.TorchFetch):  # type: ignore[misc, name-defined]
        def bring(self, *arguments: Any) -> None:
            if next(lacking, False):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 bytes.")
            super().bring(*arguments)

    monkeypatch.setattr("moe_local.offload.kernels.fetch.fetch_kernels", lambda device: Lacking())
    with load(folder, make_device(5), None, "off", slots=EXPERTS) as model:
        want = answer(model)
    with load(folder, make_device(6), fake_graphs.FakeGraphs(), slots=5) as model:
        parts = model.parts
        parts.engine.relief = lambda lacking: True
        assert parts.engine.token_step is not None
        for layer in range(len(model.stats().hits_by_layer)):
            parts.store.empty()
            parts.engine.token_step.captured.clear()
            parts.engine.token_step._caches.clear()
            parts.engine.forget()
            lacking = iter([*[False] * layer, True])
            assert answer(model) == want
            assert next(lacking, None) is None


def test_a_closed_model_is_gone_at_once(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
) -> None:
    """No cycle keeps weights, keys and values and graphs in VRAM, where the next model is to go."""
    model = load(make_checkpoint("qwen3_moe"), make_device(11), fake_graphs.FakeGraphs())
    assert isinstance(model.parts.store.custody, DeviceMisses)
    answer(model)
    parts = model.parts
    watched = [weakref.ref(part) for part in (parts.hf, parts.engine, parts.engine.kv, parts.store)]
    gc.collect()
    gc.disable()
    try:
        del parts
        model.close()
        assert [part() for part in watched] == [None] * 4
    finally:
        gc.enable()


# --- What is tried at load


def reason(caplog: pytest.LogCaptureFixture) -> str:
    (text,) = [m for r in caplog.records if (m := r.getMessage()).startswith("misses are the host's")]
    caplog.clear()
    return text.partition(": ")[2]


@pytest.mark.parametrize("faster", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_faster_way_is_taken(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    faster: bool,
) -> None:
    caplog.set_level(logging.INFO, "moe_local")
    graphs = fake_graphs.FakeGraphs()

    def seconds(compute: Any) -> float:
        before = graphs.replays
        compute()
        return 1.0 if (graphs.replays - before == 1) == faster else 2.0

    monkeypatch.setattr(miss_trial, "seconds", seconds)
    with load(make_checkpoint("qwen3_moe"), make_device(8), graphs, "auto") as model:
        assert isinstance(model.parts.store.custody, DeviceMisses) == faster
        if not faster:
            assert reason(caplog) == "left to the device, they took longer"
        ids = answer(model)
        switch = model.parts.switch
        assert switch is not None
        assert switch.on_device == faster
        for to_device in (not faster, faster):
            switch.turn(to_device=to_device)
            model.parts.engine.forget()
            assert answer(model) == ids
            assert isinstance(model.parts.store.custody, DeviceMisses) == to_device
    with load(make_checkpoint("qwen3_moe"), make_device(8), graphs, "on") as model:
        assert isinstance(model.parts.store.custody, DeviceMisses)


@pytest.mark.parametrize("slots", [SLOTS, 2])
def test_experts_give_way_to_the_trial(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    slots: int,
) -> None:
    """It begins anew then, as long as there are slots that no token needs."""
    caplog.set_level(logging.INFO, "moe_local")
    monkeypatch.setattr("moe_local.offload.tiers.device_arena.SEGMENT_BYTES", 1)
    monkeypatch.setattr("moe_local.offload.gpu.relief.MARGIN", 0)
    lacking = iter([False, False, True])

    class Lacking(torch_kernels.TorchFetch):  # type: ignore[misc, name-defined]
        def bring(self, *arguments: Any) -> None:
            if next(lacking, False):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 bytes.")
            super().bring(*arguments)

    monkeypatch.setattr("moe_local.offload.kernels.fetch.fetch_kernels", lambda device: Lacking())
    with load(make_checkpoint("qwen3_moe"), make_device(8), fake_graphs.FakeGraphs(), slots=slots) as model:
        gave_way = slots == SLOTS
        assert ("VRAM ran out" in caplog.text) == gave_way
        assert isinstance(model.parts.store.custody, DeviceMisses) == gave_way
        if not gave_way:
            assert reason(caplog).startswith("OutOfMemoryError")
        assert model.stats().hits == model.stats().misses == 0
        assert answer(model)


@pytest.mark.slow
def test_where_the_device_is_not_left_with_misses(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each reason is said, and the host goes on as ever."""
    caplog.set_level(logging.INFO, "moe_local")
    folder, graphs = make_checkpoint("qwen3_moe"), fake_graphs.FakeGraphs()

    def refused(words: str, mode: str = "auto", graphs: Any = graphs, **options: Any) -> None:
        with load(folder, make_device(9), graphs, mode, **options) as model:
            assert words in reason(caplog)
            assert not isinstance(model.parts.store.custody, DeviceMisses)
            assert expert_runner(model).token_path is None or options.get("slots") == EXPERTS

    refused("no expert will ever be missing", slots=EXPERTS)
    with monkeypatch.context() as patch:
        patch.setenv("MOE_LOCAL_GRAPHS", "off")
        refused("fixed addresses")
    refused("prefetch is 'router'", prefetch="router")
    refused("miss is 'cpu'", miss="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(miss_trial, "LARGEST", 4096)
        refused("beside which the host's part does not count")
    with monkeypatch.context() as patch:
        patch.setattr("moe_local.offload.kernels.fetch.fetch_kernels", lambda device: None)
        refused("Triton does not run here")
    with monkeypatch.context() as patch:
        patch.setattr(miss_trial, "link_limit", lambda: 10**9)
        refused("slower link")

    class Wrong(torch_kernels.TorchFetch):  # type: ignore[misc, name-defined]
        def bring(self, *arguments: Any) -> None:
            pass

    class Broken(torch_kernels.TorchFetch):  # type: ignore[misc, name-defined]
        def bring(self, *arguments: Any) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    for fetch, words in ((Wrong(), "of their norm"), (Broken(), "RuntimeError: an illegal memory access")):
        with monkeypatch.context() as patch:
            patch.setattr("moe_local.offload.kernels.fetch.fetch_kernels", lambda device, fetch=fetch: fetch)
            refused(words, "on")
    with load(folder, make_device(9), graphs, "off") as model:
        assert not [r for r in caplog.records if "misses are" in r.getMessage()]
        assert model.parts.switch is None


@pytest.mark.slow
def test_the_cpu_may_take_part_otherwise(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
) -> None:
    """With miss="auto" prompts may still be shared with the CPU; single tokens are not."""
    folder = make_checkpoint("qwen3_moe")
    with load(folder, make_device(10), fake_graphs.FakeGraphs(), miss="auto") as model:
        assert isinstance(model.parts.store.custody, DeviceMisses)
        assert model.parts.store.host is not None
        assert answer(model, 20, 20)
        assert model.stats().stall.demand > 0


@pytest.mark.parametrize("wrong", [False, True])
def test_how_the_cpu_rounds_says_nothing_about_the_device(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: bool,
) -> None:
    """Where 48 layers have amplified it, that may be more than what is wrong on the device."""
    caplog.set_level(logging.INFO, "moe_local")
    one_round = miss_trial._one_round

    def off(engine: Any, row: int) -> tuple[list[torch.Tensor], float]:
        logits, took = one_round(engine, row)
        on_device = type(model_store[-1].custody) is DeviceMisses
        if not on_device and model_store[-1].host is not None:
            logits = [1.2 * each for each in logits]
        if on_device and wrong:
            logits[-1] *= 1.15
        return logits, took

    model_store: list[Any] = []
    hindrance = miss_trial.hindrance
    monkeypatch.setattr(miss_trial, "_one_round", off)
    monkeypatch.setattr(
        miss_trial,
        "hindrance",
        lambda engine, runner, *rest: model_store.append(runner.store) or hindrance(engine, runner, *rest),
    )
    with load(make_checkpoint("qwen3_moe"), make_device(11), fake_graphs.FakeGraphs(), miss="auto") as model:
        assert isinstance(model.parts.store.custody, DeviceMisses) == (not wrong)
        assert model.parts.store.host is not None
        assert ("logits were off by 0.15 of their norm" in caplog.text) == wrong


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert miss_mode() == "auto"
    for mode in ("", "on", "off", "auto"):
        monkeypatch.setenv(VARIABLE, mode)
        assert miss_mode() == (mode or "auto")
    monkeypatch.setenv(VARIABLE, "always")
    with pytest.raises(OptionError, match=f"{VARIABLE} is 'always'; it may be auto, on, off"):
        moe_local.load("demo")
