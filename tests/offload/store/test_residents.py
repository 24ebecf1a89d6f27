"""Resident experts found by a table on the device, against the host that names them; Triton stood in for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_local
from moe_local.offload.store.residents import ResidentLayer
from support import fake_graphs, torch_kernels

torch.set_num_threads(1)

PROMPT, NEW = list(range(3, 14)), 12


@pytest.fixture(autouse=True)
def make_device(make_device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Of devices that compute single tokens with torch's kernels, from graphs."""
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", "on")
    torch_kernels.use(monkeypatch)
    return torch_kernels.devices(make_device)


@pytest.fixture
def load() -> Callable[..., moe_local.Model]:
    """load(folder, device, graphs=None, slots=8, ...) -> a model on that device."""
    loaded: Callable[..., moe_local.Model] = functools.partial(torch_kernels.load, slots=8, context=64)
    return loaded


def answer(model: moe_local.Model) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=NEW, eos_token_id=None).token_ids


def run(model: moe_local.Model) -> tuple[list[int], Any]:
    """The ids and the counts of two answers, from none at all."""
    assert model.stats().hits == model.stats().misses == sum(model.stats().routed.tokens) == 0
    ids = answer(model) + answer(model)
    model.check_integrity()
    return ids, model.stats()


@pytest.mark.parametrize(
    "model_type",
    ["gpt_oss", *(pytest.param(t, marks=pytest.mark.slow) for t in ("mixtral", "qwen3_moe", "deepseek_v3"))],
)
def test_the_device_finds_what_the_host_would_name(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    """The same ids and counts, and with graphs the whole step in one of them."""
    folder = make_checkpoint(model_type)
    with monkeypatch.context() as patch:
        patch.setattr("moe_local.offload.experts.ExpertRunner.keep_residents", lambda self: None)
        with load(folder, make_device(1)) as model:
            want, counts = run(model)
    with load(folder, make_device(2)) as model:
        model._open().store.serve = None  # type: ignore[method-assign, assignment]
        with pytest.raises(TypeError):
            answer(model)  # a prompt of several tokens is the host's
    with load(folder, make_device(3)) as model:
        ids, stats = run(model)
        assert ids == want
        assert (stats.hits_by_layer, stats.misses) == (counts.hits_by_layer, counts.misses)
        assert stats.routed == counts.routed
    graphs = fake_graphs.FakeGraphs()
    with load(folder, make_device(4), graphs) as model:
        step = model._open().engine.token_step
        assert step is not None
        assert [captured.segments for captured in step.captured.values()] == [1]
        captures = graphs.captures
        ids, stats = run(model)
        assert ids == want
        assert (stats.hits_by_layer, stats.misses) == (counts.hits_by_layer, counts.misses)
        assert stats.routed == counts.routed
        assert graphs.captures == captures
        layers = len(stats.hits_by_layer)
        stream = model.stream(PROMPT, max_new_tokens=3, eos_token_id=None)
        assert [token.hits for token in stream] == [2 * layers] * 3
        # where experts lose their slots, nothing goes by the old table
        with monkeypatch.context() as patch:
            patch.setattr(model._open().store, "slots", lambda layer: 7)
            assert answer(model) + answer(model) == want
            assert [captured.segments for captured in step.captured.values()] == [layers + 1]


@pytest.mark.parametrize("prefetch", [pytest.param("off", marks=pytest.mark.slow), "router"])
def test_offloaded_experts_between_segments(
    load: Callable[..., moe_local.Model],
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    prefetch: str,
) -> None:
    """As many tokens, hits, and guesses: replays see the residual that a hook would have seen."""
    folder = make_checkpoint("qwen3_moe")
    found = []
    for graphs in (None, fake_graphs.FakeGraphs()):
        device = make_device(5)
        with load(folder, device, graphs, slots=2, prefetch=prefetch) as model:
            assert model.plan.mode == "offload"
            ids, stats = run(model)
            assert (stats.prefetch.issued > 0) == (prefetch == "router")
            assert (model._open().engine.token_step is not None) == (graphs is not None)
            found.append((ids, stats.hits + stats.misses, stats.routed, stats.prefetch.issued))
            assert device.faults == []
        assert graphs is None or graphs.replays > 4 * NEW
        with pytest.raises(moe_local.MoeLocalError, match="closed"):
            model.generate(PROMPT)
    assert found[0] == found[1]


class Idle:
    """A launcher whose kernels do nothing, and which keeps the tables that it is given."""

    width = hidden = 8

    def __init__(self) -> None:
        self.tables: list[list[list[int]]] = []

    def planes(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def up(self, base: Any, stride: int, table: torch.Tensor, *rest: Any) -> None:
        self.tables.append(table.tolist())

    def down(self, *arguments: Any) -> None:
        pass

    combine = down


class Operations(TorchDispatchMode):
    """Names of what is given to a device, beside memory and views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_a_token_is_counted_and_found_in_two_operations() -> None:
    launcher: Any = Idle()
    counts = torch.zeros(5, dtype=torch.int64)
    layer = ResidentLayer(launcher, torch.tensor([40, 30, 0, 10, 20]), counts)
    base, x = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, 8)
    with torch.inference_mode():
        layer.run(base, x, torch.tensor([[3, 0]]), torch.ones(1, 2))
    index, weights = torch.tensor([[1, 3]]), torch.ones(1, 2)
    with (
        torch.no_grad(),
        Operations() as done,
    ):  # where nothing that was made in inference mode can be written
        layer.run(base, x, index, weights)
    assert [name for name in done.names if name.startswith("index") or name in ("stack", "cat")] == [
        "index_add_",
        "index_select",
    ]
    layer.run(base, x, torch.tensor([[4]]), torch.ones(1, 1))
    assert launcher.tables == [[[10, 0], [40, 1]], [[30, 0], [10, 1]], [[20, 0]]]
    assert counts.tolist() == [1, 1, 0, 2, 1]
