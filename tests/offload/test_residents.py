"""Resident experts found by a table on the device, against the host that names them; Triton stood in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.checkpoint import skeleton
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.kernels.cpu import CpuExperts
from moe_local.offload.kernels.grouped import GroupedExperts
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.fit import plan_memory
from moe_local.offload.plan.footprint import expert_bytes
from moe_local.offload.plan.plan import Request
from moe_local.offload.quantize.layout import Layout

torch.set_num_threads(1)

CPU = torch.device("cpu")
PROMPT, NEW = list(range(3, 14)), 12


class Launcher:
    """As kernels.launcher's, for fp32 experts, by torch: finds their bytes by base, stride and table."""

    def __init__(self, math: Any, layout: Layout) -> None:
        self.layout, self._math = layout, math
        shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        self.width, self.hidden = shapes["down_proj"]
        self._first = next(name for name in ("gate_up_proj", "up_proj") if name in shapes)

    def planes(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()

    def up(self, base: Any, stride: int, table: Any, planes: Any, hidden: Any, top_k: int) -> None:
        x = planes.index_select(0, table[:, 1] // top_k)
        hidden.index_copy_(
            0, table[:, 1], self._math.activate(self._linear(base, stride, table, x, self._first))
        )

    def down(self, base: Any, stride: int, table: Any, hidden: Any, outputs: Any) -> None:
        x = hidden.index_select(0, table[:, 1])
        outputs.index_copy_(0, table[:, 1], self._linear(base, stride, table, x, "down_proj"))

    def combine(self, outputs: Any, weights: Any, combined: Any) -> None:
        combined.copy_((outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1))

    def _linear(self, base: Any, stride: int, table: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        """x [G, in] -> [G, out]"""
        y = (self._weights(base, stride, table, name) @ x.unsqueeze(-1)).squeeze(-1)
        return y + self._weights(base, stride, table, f"{name}_bias") if self._math.has_bias else y

    def _weights(self, base: Any, stride: int, table: Any, name: str) -> torch.Tensor:
        """fp32 [G, out, in], or [G, out] for a bias."""
        (segment,) = self.layout.parts(name)
        memory = base.as_strided((base.untyped_storage().nbytes(),), (1,), 0)
        starts = base.storage_offset() + table[:, 0] * stride + segment.offset
        places = starts.unsqueeze(1) + torch.arange(segment.nbytes)
        packed = memory.index_select(0, places.flatten()).view(len(table), segment.nbytes)
        return packed.view(torch.float32).view(len(table), *segment.shape)


@pytest.fixture
def make_device(make_device: Callable[..., Any]) -> Callable[..., Any]:
    """Devices whose allocations are parts of one, since a Launcher can't reach from one into another."""

    def make(*arguments: Any, **options: Any) -> Any:
        device = make_device(*arguments, **options)
        allocate, memory, taken = device.allocate, torch.zeros(1 << 25, dtype=torch.uint8), 0

        def carve(nbytes: int) -> torch.Tensor:
            nonlocal taken
            allocate(nbytes)
            part = memory[taken : taken + nbytes]
            taken += -(-nbytes // 512) * 512
            assert taken <= memory.numel()
            return part

        device.allocate = carve
        return device

    return make


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LOCAL_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("MOE_LOCAL_GRAPHS", "on")
        yield


@pytest.fixture(autouse=True)
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens are computed by Launchers; nothing runs in the library, whose work nobody records."""
    for name in ("use_native_linears", "use_native_norms", "use_native_routers", "use_token_attention"):
        monkeypatch.setattr(skeleton, name, lambda model: None)
    monkeypatch.setattr(CpuExperts, "serves", lambda self, *arguments: False)
    monkeypatch.setattr(
        GroupedExperts,
        "serves",
        lambda self, math, x, routing, layout: routing.tokens == 1,
    )
    launchers: dict[Any, Launcher] = {}

    def launcher(self: GroupedExperts, math: Any, device: torch.device, layout: Layout) -> Any:
        return launchers.setdefault(math, Launcher(math, layout))

    monkeypatch.setattr(GroupedExperts, "launcher", launcher)
    monkeypatch.setattr("moe_local.offload.experts.warm_up", lambda *arguments: None)


def load(folder: Path, device: Any, graphs: Any = None, *, slots: int = 8, **options: Any) -> moe_local.Model:
    """As `load` on a card with so many slots a layer over RAM that holds all."""
    checkpoint = Checkpoint.open(folder)
    given = {"slots": slots, "context": 64, "experts": "fp32", "dense": "fp32"}
    plan = plan_memory(
        Request(
            model=checkpoint.name,
            spec=checkpoint.spec,
            ram=8 * sum(expert_bytes(checkpoint.spec, "fp32")),
            vram=2**30,
            **given,
        )
    ).check()
    settings = LoadOptions(miss="fetch", **given, **options)
    file = open_experts(checkpoint, "fp32")
    return assemble(checkpoint, file, plan, settings, CPU, device, graphs=graphs)


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
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    fake_graphs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    """The same ids and counts, and with graphs the whole step in one of them."""
    folder = make_checkpoint(model_type)
    with monkeypatch.context() as patch:
        patch.setattr("moe_local.offload.experts.ExpertRunner.keep_to_device", lambda self: None)
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
        assert graphs.captures == 1
        ids, stats = run(model)
        assert ids == want
        assert (stats.hits_by_layer, stats.misses) == (counts.hits_by_layer, counts.misses)
        assert stats.routed == counts.routed
        assert graphs.captures == 1
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
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    fake_graphs: ModuleType,
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
