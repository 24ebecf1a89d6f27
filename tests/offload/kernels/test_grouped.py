"""The step around the grouped kernels, which are stood in for by torch here: Triton is not needed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_local.offload.kernels import grouped, triton_needs
from moe_local.offload.kernels.expert import ExpertKernels
from moe_local.offload.kernels.grouped import DECODE_TOKENS, MOST_TOKENS, GroupedExperts, GroupedStep
from moe_local.offload.kernels.grouped_formats import FORMATS
from moe_local.offload.kernels.launcher import UNIT, Launcher, triton_kernels
from moe_local.offload.kernels.layer import LayerKernels, OneByOne
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import library
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec
from support.expert_codecs import expert_codec
from support.expert_math import Lease, Math

D, FF, EXPERTS = 64, 128, 7
CPU = torch.device("cpu")


class Stand:
    """As Launcher: finds experts by base, stride and slot alone, and computes them in `down`."""

    def __init__(self, arena: torch.Tensor, layout: Layout) -> None:
        self.arena, self.layout = arena, layout
        self.width, self.hidden = D, FF
        self.tables: list[torch.Tensor] = []

    def planes(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()

    def up(
        self, base: torch.Tensor, stride: int, table: torch.Tensor, x: torch.Tensor, hidden: Any, top_k: int
    ) -> None:
        self.tables.append(table)
        self.x, self.top_k = x, top_k

    def down(
        self, base: torch.Tensor, stride: int, table: torch.Tensor, hidden: Any, outputs: torch.Tensor
    ) -> None:
        assert table is self.tables[-1]
        for slot, *places in table.tolist():
            start = base.storage_offset() + slot * stride
            buffer = self.arena[start : start + self.layout.nbytes]
            for place in places:
                if place >= 0:
                    token = place // self.top_k
                    (outputs[place],) = ExpertKernels().forward(
                        Math(), self.x[token : token + 1], buffer, self.layout
                    )

    def combine(self, outputs: torch.Tensor, weights: torch.Tensor, combined: torch.Tensor) -> None:
        combined.copy_((outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1))


class Rig:
    """Experts of a layer in slots of an arena, last first."""

    def __init__(self, format: str = "nf4") -> None:
        specs = [TensorSpec("gate_up_proj", (2 * FF, D)), TensorSpec("down_proj", (D, FF))]
        codec = codec_for(format)
        self.layout = codec.layout(specs)
        stride, generator = self.layout.nbytes, torch.Generator().manual_seed(0)
        arena = torch.empty(EXPERTS * stride, dtype=torch.uint8)
        self.leases = []
        for expert in range(EXPERTS):
            start = (EXPERTS - 1 - expert) * stride
            buffer = arena[start : start + stride]
            weights = {spec.name: torch.randn(spec.shape, generator=generator) / 8 for spec in specs}
            codec.encode(weights, self.layout, buffer)
            self.leases.append(Lease(expert, buffer, self.layout))
        self.stand = Stand(arena, self.layout)
        self.rests = 0

    def step(
        self,
        x: torch.Tensor,
        routing: Routing,
        weights: torch.Tensor,
        launcher_for: Any = lambda layout: None,
    ) -> GroupedStep:
        def rest(outputs: torch.Tensor) -> OneByOne:
            self.rests += 1
            return OneByOne(ExpertKernels(), Math(), x, routing, weights, outputs)

        launcher: Any = self.stand
        return GroupedStep(launcher, x, routing, weights, rest, launcher_for)

    def run(self, step: Any, groups: Sequence[Sequence[int]]) -> torch.Tensor:
        for group in groups:
            step.compute([self.leases[expert] for expert in group])
        result: torch.Tensor = step.result()
        return result


def routed(tokens: int, top_k: int) -> tuple[torch.Tensor, Routing, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * tokens + top_k)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k)
    x = torch.randn(tokens, D, generator=generator)
    return x, Routing(ids.flatten().tolist(), tokens, EXPERTS), weights


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 4), (3, 2), (8, 7), (20, 3), (64, 2)])
def test_a_step_equals_one_by_one_in_every_group(tokens: int, top_k: int) -> None:
    rig = Rig()
    x, routing, weights = routed(tokens, top_k)
    used = routing.experts
    want = rig.run(OneByOne(ExpertKernels(), Math(), x, routing, weights), [used])
    for groups in ([used], [[expert] for expert in reversed(used)], [used[1:], used[:1]]):
        got = rig.run(rig.step(x, routing, weights), groups if all(groups) else [used])
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_table_names_slots_and_places() -> None:
    rig = Rig()
    x, weights = torch.randn(3, D), torch.rand(3, 2)
    routing = Routing([4, 1, 4, 6, 1, 4], 3, EXPERTS)
    step = rig.step(x, routing, weights)
    rig.run(step, [[4, 6], [1]])
    first, second = rig.stand.tables
    apart = rig.layout.nbytes // UNIT
    assert first.tolist() == [[0, 0, 2, 5, -1], [-2 * apart, 3, -1, -1, -1]]
    assert second.tolist() == [[0, 1, 4, -1, -1]]
    assert first.dtype == torch.int64


def test_the_width_of_the_table_depends_on_the_routing_alone() -> None:
    for tokens, width in ((1, 1), (2, 2), (3, 4), (5, 8), (8, 8)):
        rig = Rig()
        routing = Routing([2] * tokens, tokens, EXPERTS)
        rig.run(rig.step(torch.randn(tokens, D), routing, torch.ones(tokens, 1)), [[2]])
        assert [table.shape[1] - 1 for table in rig.stand.tables] == [width]


def test_every_layout_of_a_group_has_a_launch_of_its_own() -> None:
    """Into the same outputs; a layout without a launcher goes elsewhere."""
    x, routing, weights = routed(2, 5)
    rig, other, third = Rig(), Rig("int8"), Rig("bf16")
    used = routing.experts
    rig.leases[used[0]], rig.leases[used[2]] = other.leases[used[0]], other.leases[used[2]]
    rig.leases[used[1]] = third.leases[used[1]]
    wanted = rig.run(OneByOne(ExpertKernels(), Math(), x, routing, weights), [used])
    asked: list[str] = []

    def launcher_for(layout: Layout) -> Any:
        asked.append(layout.format)
        return other.stand if layout == other.layout else None

    for groups in ([used], [[expert] for expert in reversed(used)]):
        step = rig.step(x, routing, weights, launcher_for)
        assert torch.allclose(rig.run(step, groups), wanted, rtol=1e-5, atol=1e-6)
    assert set(asked) == {"int8", "bf16"}  # its own layout's launcher the step has
    assert sorted(map(len, other.stand.tables)) == [1, 1, 2]
    assert rig.rests == 2


def test_experts_with_many_tokens_and_other_layouts_go_elsewhere() -> None:
    rig = Rig()
    many = MOST_TOKENS + 1
    x, weights = torch.randn(many + 2, D), torch.rand(many + 2, 1)
    routing = Routing([3] * many + [5, 6], many + 2, EXPERTS)
    other = Rig("int8").leases[6]
    step = rig.step(x, routing, weights)
    rig.leases[6] = other
    got = rig.run(step, [[3, 5], [6]])
    assert rig.rests == 1
    assert [len(table) for table in rig.stand.tables] == [1]
    want = rig.run(OneByOne(ExpertKernels(), Math(), x, routing, weights), [[3, 5, 6]])
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_only_rows_of_whole_pieces_and_blocks_are_served() -> None:
    def layout(format: str, *shapes: tuple[int, int]) -> Layout:
        specs = [TensorSpec(f"w{i}", shape) for i, shape in enumerate(shapes)]
        found: Layout = expert_codec(format).layout(specs)
        return found

    assert Launcher.served(layout("nf4", (128, 64), (64, 64)))
    assert not Launcher.served(layout("nf4", (128, 64), (64, 96)))
    assert not Launcher.served(layout("nf4", (192, 96), (96, 64)))
    assert Launcher.served(layout("int8", (128, 64), (64, 64)))
    assert Launcher.served(layout("int8", (96, 48), (48, 96)))
    assert not Launcher.served(layout("int8", (128, 64), (64, 40)))
    assert not Launcher.served(layout("bf16", (128, 64), (64, 64)))
    for second in ("nvfp4", "nvfp4, divided"):
        assert Launcher.served(layout(second, (192, 96), (96, 64)))
        assert not Launcher.served(layout(second, (96, 48), (48, 96)))  # half a piece at the end


def test_nvfp4_is_served_if_all_matrices_are_it() -> None:
    """The layout of an expert has that name if one of them is."""
    layout: Layout = expert_codec("nvfp4").layout([TensorSpec("w1", (64, 64)), TensorSpec("w2", (64, 64))])
    for gone in ("q", "scale", "factor"):
        kept = tuple(part for part in layout.segments if (part.name, part.part) != ("w2", gone))
        assert not Launcher.served(replace(layout, segments=kept))
    exponents = tuple(
        replace(part, dtype="uint8") if part.part == "scale" else part for part in layout.segments
    )
    assert not Launcher.served(replace(layout, segments=exponents))


def test_what_kernels_look_up_stays_where_it_is_on_every_card() -> None:
    """A graph goes on reading the tables that it was captured with."""
    cards = [torch.device("cpu", number) for number in range(8)]
    first = [form.tables(card) for form in FORMATS for card in cards]
    again = [form.tables(card) for form in FORMATS for card in cards]
    assert all(
        a is b for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_without_triton_it_is_said_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "moe_local.offload.kernels.triton_experts", raising=False)
    triton_kernels.cache_clear()
    caplog.set_level(logging.INFO, "moe_local")
    try:
        experts = GroupedExperts()
        maths: list[Any] = [Math(), Math()]
        assert [experts.launcher(math, CPU, Rig().layout) for math in maths] == [None, None]
    finally:
        triton_kernels.cache_clear()
    said = [record for record in caplog.records if "Triton" in record.message]
    if library() is not None:  # without it no gate is known, and Triton not asked for
        assert [record.levelno for record in said] == [logging.WARNING]
        assert len(said[0].message.splitlines()) == 1
        assert "; pip install triton" in said[0].message


def test_triton_can_be_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOE_LOCAL_TRITON", "off")
    monkeypatch.setitem(sys.modules, "triton", None)
    triton_kernels.cache_clear()
    try:
        assert triton_kernels(CPU) is None
    finally:
        triton_kernels.cache_clear()
    assert not caplog.records


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("compiler", "install a C compiler"),
        ("headers", "python3-dev"),
        ("nothing", "--force-reinstall torch"),
    ],
)
def test_what_triton_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: str, said: str
) -> None:
    monkeypatch.setattr(triton_needs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_needs.sys, "platform", "linux")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_needs.shutil, "which", lambda name: None if lacks == "compiler" else "/gcc")
    (tmp_path / "Python.h").touch()
    there = tmp_path / ("nothing" if lacks == "headers" else "Python.h")
    monkeypatch.setattr(triton_needs, "headers", lambda: there)
    assert said in triton_needs.remedy()
    assert said in triton_needs.remedy(RuntimeError("whatever"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/.triton"), "TRITON_CACHE_DIR"),
        (OSError(28, "No space left on device"), "TRITON_CACHE_DIR"),
        (AssertionError("libcuda.so cannot found!\nPlease make sure"), "TRITON_LIBCUDA_PATH"),
        (FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"), "TRITON_LIBCUDA_PATH"),
    ],
)
def test_what_keeps_triton_from_running_is_told_from_its_error(error: Exception, said: str) -> None:
    assert said in triton_needs.remedy(error)


def test_a_compiler_that_is_named_and_not_there_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_needs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_needs.sys, "platform", "linux")
    monkeypatch.setenv("CC", "/nowhere/gcc-99")
    error = FileNotFoundError(2, "No such file or directory", "/nowhere/gcc-99")
    assert "set CC to a C compiler, or unset it: there is no /nowhere/gcc-99" in triton_needs.remedy(error)


class OnGpu:
    """What `serves` looks at of a tensor."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "triton_kernels", lambda device: object())
    monkeypatch.setattr(grouped, "can_shuffle", lambda device: False)
    monkeypatch.setattr(grouped, "recognize", lambda math: None if math.has_bias else object())
    launched: list[Any] = []

    class Recorded(Launcher):
        def __init__(self, kernels: Any, layout: Layout, gate: Any, **options: bool) -> None:
            launched.append(options)
            self.layout = layout

    monkeypatch.setattr(grouped, "Launcher", Recorded)
    experts, math, layout = GroupedExperts(), Math(), Rig().layout

    def served(tokens: int = 1, dtype: torch.dtype = torch.bfloat16, **other: Any) -> bool:
        x: Any = OnGpu(dtype)
        routing = Routing([0] * tokens, tokens, EXPERTS)
        return experts.serves(other.get("math", math), x, routing, other.get("layout", layout))

    assert served()
    assert served(DECODE_TOKENS, torch.float16)
    assert served(layout=Rig().layout)  # equal, yet another
    assert launched == [{"has_gate": True, "has_bias": False, "shuffles": False}]
    assert not served(0)
    assert not served(DECODE_TOKENS + 1)
    assert not served(dtype=torch.float64)
    assert served(layout=Rig("int8").layout)
    assert len(launched) == 2
    assert not served(layout=Rig("bf16").layout)
    unknown: Any = Math()
    unknown.has_bias = True
    assert not served(math=unknown)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    assert not served()


def test_on_the_cpu_nothing_is_grouped() -> None:
    x, routing, weights = routed(2, 2)
    assert not GroupedExperts().serves(Math(), x, routing, Rig().layout)
    assert not isinstance(LayerKernels().begin(Math(), x, routing, weights, Rig().layout), GroupedStep)
