"""What is tried before a model decodes from graphs; and the graphs of tests, which are not CUDA's."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.offload.checkpoint.skeleton import replace_experts
from moe_local.offload.engine import graph_trial
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.graph_trial import VARIABLE, graph_mode, use_graphs
from moe_local.offload.engine.graphs import CudaGraphs
from moe_local.offload.engine.kv_slab import KVSlab
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.own_caches import OwnCaches
from moe_local.offload.engine.state_slab import StateSlab
from moe_local.offload.engine.static_row import StaticLayer
from moe_local.offload.engine.token_step import TokenStep
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.gpu.relief import Shortage
from moe_local.offload.modeling.masks import eager_mask, use_capturable_mask
from support import fake_graphs, tiny_models

torch.set_num_threads(1)


@pytest.fixture
def hf() -> Any:
    return offloaded(tiny_models.tiny_model("mixtral", num_hidden_layers=2))


def offloaded(model: Any) -> Any:
    replace_experts(model)
    return model


def tried(hf: Any, graphs: Any, mode: str = "on", kv: Any = None) -> Engine:
    engine = Engine(hf, kv or make_kv(hf, 1, 64), chunk=8)
    use_graphs(engine, graphs, mode=mode)
    engine.check_integrity()
    assert engine.kv.lens == []
    assert all(m.seam is None and m.runner is None for m in hf.modules() if isinstance(m, OffloadedExperts))
    return engine


def test_a_model_that_can_be_captured_is(hf: Any) -> None:
    graphs = fake_graphs.FakeGraphs()
    engine = tried(hf, graphs)
    assert engine.token_step is not None
    assert engine.token_step.failure is None
    assert [step.segments for step in engine.token_step.captured.values()] == [3]
    assert tried(hf, graphs, "off").token_step is None


@pytest.mark.parametrize("stale", [False, True])
def test_real_experts_are_compared_with_themselves(
    hf: Any, monkeypatch: pytest.MonkeyPatch, stale: bool
) -> None:
    """Not with the plain forward's, in which rounding may have led to others; but replays must be right."""

    under_way: list[str] = []

    class Runner:
        def run(self, experts: Any, hidden: Any, index: Any, weights: Any) -> torch.Tensor:
            other = under_way == ["plain_logits"] or (stale and under_way == ["computed"])
            output: torch.Tensor = (2.0 if other else 1.0) * hidden * weights.sum()
            return output

    def noted(cls: Any, name: str) -> None:
        method = getattr(cls, name)

        def call(*args: Any, **options: Any) -> Any:
            under_way.append(name)
            try:
                return method(*args, **options)
            finally:
                under_way.pop()

        monkeypatch.setattr(cls, name, call)

    noted(Engine, "plain_logits")
    noted(TokenStep, "computed")
    for module in hf.modules():
        if isinstance(module, OffloadedExperts):
            module.attach(Runner())
    engine = Engine(hf, make_kv(hf, 1, 64), chunk=8)
    use_graphs(engine, fake_graphs.FakeGraphs(), mode="on", stand_in=False)
    assert (engine.token_step is None) == stale
    assert engine.kv.lens == []


@pytest.mark.parametrize("lacks", ["result", "end"])
def test_memory_that_a_trial_lacks_is_given_back_by_experts(hf: Any, lacks: str) -> None:
    """Or the bits of tokens would depend on what was free when the model was loaded."""
    graphs = fake_graphs.FakeGraphs(room=1, lacks=lacks)
    engine = Engine(hf, make_kv(hf, 1, 64), chunk=8)
    given: list[Shortage] = []

    def relief(lacking: Shortage) -> bool:
        given.append(lacking)
        graphs.room = None if len(given) == 2 else graphs.captures
        return len(given) <= 2

    engine.relief = relief
    use_graphs(engine, graphs, mode="on")
    assert engine.token_step is not None
    assert engine.token_step.captured
    assert len(given) == graphs.refusals == 2
    assert engine.kv.lens == []


def eager_mask_with_a_copy(dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """As transformers 5.17 to 5.20 make it."""
    seen = sdpa_mask(**options | {"allow_is_causal_skip": False})
    zero = torch.tensor(0.0, device=seen.device, dtype=dtype)
    return torch.where(seen, zero, torch.finfo(dtype).min)


@pytest.fixture
def eager_copies(monkeypatch: pytest.MonkeyPatch) -> Any:
    known = AttentionMaskInterface._global_mapping
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", {**known, "eager": eager_mask_with_a_copy})
    return eager_mask_with_a_copy


def test_eager_attention_is_captured_where_its_mask_brings_numbers_from_the_host(eager_copies: Any) -> None:
    model = offloaded(tiny_models.tiny_model("gpt_oss"))
    assert model.config._attn_implementation == "eager"
    engine = tried(model, fake_graphs.FakeGraphs())
    assert engine.token_step is not None
    assert engine.token_step.failure is None


@pytest.mark.parametrize("make", [create_causal_mask, create_sliding_window_causal_mask])
def test_the_mask_is_that_of_transformers(make: Any, eager_copies: Any) -> None:
    config = tiny_models.tiny_config("gpt_oss", sliding_window=3)
    config._attn_implementation = "eager"
    embeds = torch.zeros(2, 5, 4, dtype=torch.bfloat16)
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])

    def masks() -> list[torch.Tensor]:
        return [make(config, embeds, given, None) for given in (None, padding)]

    theirs = masks()
    use_capturable_mask(SimpleNamespace(config=config))
    assert AttentionMaskInterface._global_mapping["eager"] is eager_mask
    ours = masks()
    for want, got in zip(theirs, ours, strict=True):
        assert got.dtype == want.dtype == torch.bfloat16
        assert torch.equal(got, want)


@pytest.mark.parametrize("faster", [True, False])
def test_the_clock_decides_about_replaying_but_not_about_bits(
    hf: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, faster: bool
) -> None:
    caplog.set_level(logging.INFO, "moe_local")
    graphs = fake_graphs.FakeGraphs()

    def seconds(compute: Any) -> float:
        before = graphs.replays
        compute()
        return 1.0 if (graphs.replays > before) == faster else 2.0

    monkeypatch.setattr(graph_trial, "seconds", seconds)
    engine = tried(hf, graphs, "auto")
    assert engine.token_step is not None
    assert bool(engine.token_step.captured) == faster
    assert [record.message for record in caplog.records] == (
        [] if faster else ["decoding goes without CUDA graphs: with them it was slower"]
    )
    before = graphs.captures
    row = engine.kv.join()
    for token in (5, 6, 7):
        with torch.inference_mode():
            engine.token_step.logits(row, token)
        engine.kv.advance(row, 1)
    assert graphs.captures == before


def wait(module: Any, args: Any, output: Any) -> None:
    output.sum().item()


class Counter:
    """Adds a number of Python's that is another one each time: a capture freezes it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        self.calls += 1
        return output + 0.1 * self.calls


def test_models_that_cannot_be_captured_stay_plain_and_say_why(
    hf: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moe_local")

    def refused(reason: str, graphs: Any = None, kv: Any = None) -> None:
        caplog.clear()
        engine = tried(hf, graphs or fake_graphs.FakeGraphs(), kv=kv)
        assert engine.token_step is None
        (record,) = caplog.records
        assert record.message.startswith("decoding goes without CUDA graphs: ")
        assert reason in record.message
        assert "\n" not in record.message

    hook = hf.model.norm.register_forward_hook(wait)
    refused("not permitted when stream is capturing: item")
    hook.remove()
    hook = hf.model.layers[1].register_forward_hook(Counter())
    refused("replayed logits were off by")
    hook.remove()
    refused("operation failed due to", fake_graphs.FakeGraphs(fail_at=1))
    refused("out of memory", fake_graphs.FakeGraphs(room=1))
    refused("no room", kv=make_kv(hf, 1, 8))
    refused("not kept at fixed addresses", kv=OwnCaches(hf.config, 1, 64))
    for name, value, reason in (
        ("get_mask_sizes", lambda self, q: (self._keys.shape[2] - 1, 1), "Error"),
        ("get_seq_length", lambda self: self._length - 2, "logits were off by"),
        ("update", lambda self, k, v, *a, **o: (self._keys, self._values), "logits were off by"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(StaticLayer, name, value)
            refused(reason)
    with monkeypatch.context() as patch:
        patch.setattr(KVSlab, "has_indexer", True)
        refused("chooses its tokens")
    kv = make_kv(hf, 1, 64)
    hf.config._attn_implementation = "flash_attention_2"
    refused("flash_attention_2", kv=kv)


def test_states_have_to_be_written_by_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moe_local")
    model = offloaded(tiny_models.tiny_model("qwen3_next"))
    engine = tried(model, fake_graphs.FakeGraphs())
    assert engine.token_step is not None
    assert isinstance(engine.kv, StateSlab)
    assert not any(tensor.any() for store in engine.kv.states.values() for tensor in store.tensors())
    static_row = StateSlab.static_row

    def stale(self: StateSlab, *args: Any) -> Any:
        cache = static_row(self, *args)
        for index in self.states:
            cache.layers[index].update_recurrent_state = lambda states, *args, **options: states
        return cache

    monkeypatch.setattr(StateSlab, "static_row", stale)
    assert tried(model, fake_graphs.FakeGraphs()).token_step is None
    assert "logits were off by" in caplog.text


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_windows_are_tried_where_they_hide_something(
    monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    model = offloaded(tiny_models.tiny_model(model_type, sliding_window=20))
    assert tried(model, fake_graphs.FakeGraphs()).token_step is not None
    kv = make_kv(model, 1, 64)
    model.config.sliding_window = (
        None if model_type == "mixtral" else 64
    )  # the mask forgets, the slab does not
    assert tried(model, fake_graphs.FakeGraphs(), kv=kv).token_step is None
    assert tried(model, fake_graphs.FakeGraphs(), kv=make_kv(model, 1, 64)).token_step is not None


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert graph_mode() == "auto"
    for mode in ("", "on", "off", "auto"):
        monkeypatch.setenv(VARIABLE, mode)
        assert graph_mode() == (mode or "auto")
    monkeypatch.setenv(VARIABLE, "always")
    with pytest.raises(OptionError, match="MOE_LOCAL_GRAPHS is 'always'; it may be auto, on, off"):
        graph_mode()
    with pytest.raises(OptionError, match="MOE_LOCAL_GRAPHS"):
        moe_local.load("demo")


# --- the graphs of tests


def captured(graphs: Any, run: Any) -> tuple[Any, Any]:
    with graphs.session(), torch.inference_mode():
        graphs.begin()
        result = run()
        return result, graphs.end()


def test_nothing_happens_before_a_replay() -> None:
    x, total = torch.tensor([1.0, 2.0]), torch.zeros(2)

    def run() -> torch.Tensor:
        total.add_(x)
        return (total * 2).narrow(0, 1, 1) + 1

    result, graph = captured(fake_graphs.FakeGraphs(), run)
    assert total.tolist() == [0, 0]
    for replays in (1, 2):
        graph.replay()
        assert total.tolist() == [replays, 2 * replays]
        assert result.tolist() == [4 * replays + 1]
    x.fill_(10)
    graph.replay()
    assert result.tolist() == [2 * 14 + 1]


def test_memory_that_nobody_holds_is_used_again() -> None:
    x, graphs = torch.ones(1000), fake_graphs.FakeGraphs()

    def run() -> Any:
        for _ in range(9):
            y = x + 1
        return y, y.view(10, 100)[0]

    (y, view), graph = captured(graphs, run)
    assert graphs.pool.nbytes < 3 * 4032
    del y
    held, other = captured(graphs, lambda: x + 5)
    graph.replay()
    other.replay()
    assert view.tolist() == [2] * 100  # the view held it
    assert held.tolist() == [6] * 1000
    graph.replay()
    assert held.tolist() == [2] * 1000  # one of the nine lies where the second capture left its result


@pytest.mark.parametrize("wait", ["item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__"])
def test_waits_are_refused(wait: str) -> None:
    graphs, x = fake_graphs.FakeGraphs(), torch.ones(1)
    with graphs.session():
        graphs.begin()
        with pytest.raises(RuntimeError, match="not permitted"):
            getattr(x, wait)()
        with pytest.raises(RuntimeError, match="not permitted"):
            torch.tensor([1])
        graphs.abort()
        graphs.abort()
    getattr(x, wait)()


# --- CUDA's own, as far as it can be seen without a device


def test_cuda_is_asked_in_the_right_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of its own, between waits for what came before and comes after; from one pool."""
    calls: list[str] = []

    class Stream:
        device_index = 0

        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "own"

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            calls.append(f"on {self.name}")

        def __exit__(self, *exception: object) -> None:
            calls.append(f"off {self.name}")

    class Graph:
        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            calls.append(f"begin in {pool}, {capture_error_mode}")

        def capture_end(self) -> None:
            calls.append("end")
            if len(calls) > 20:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        def replay(self) -> None:
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("outer"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: calls.append("handle"))
    number = SimpleNamespace(zero_=lambda: calls.append("work"))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: number)
    monkeypatch.setattr(torch, "empty_like", lambda like, dtype: calls.append("room"))
    for name in ("endAllocateToPool", "releasePool"):
        note = lambda device, pool, name=name: calls.append(f"{name} {pool}")  # noqa: E731
        monkeypatch.setattr(torch._C, f"_cuda_{name}", note, raising=False)
    monkeypatch.setattr("moe_local.offload.engine.graphs._session_stream", Stream)
    graphs = CudaGraphs(torch.device("cuda:0"))
    with graphs.session():
        for _ in range(2):
            graphs.begin()
            graphs.end().replay()
    begun = "begin in the pool, thread_local"
    capture = ["cuda:0", "handle", "room", "room", begun, "end", "replay"]
    frame = ["own waits for outer", "on own"], ["off own", "outer waits for own"]
    assert calls == [*frame[0], *capture, *capture, *frame[1]]
    with pytest.raises(ValueError, match="in the model"), graphs.session():
        graphs.begin()
        graphs.abort()
        graphs.abort()
        raise ValueError("in the model")
    mended = ["endAllocateToPool the pool", "releasePool the pool", begun, "work", "end"]
    assert calls[18:] == [*frame[0], *capture[:6], *mended, *frame[1]]
