"""Kernels that compute something else than they should are found out when a model is loaded, and not used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_local.offload.kernels import grouped, grouped_trial
from moe_local.offload.kernels.grouped_trial import fault, made_expert
from moe_local.offload.kernels.launcher import Launcher
from moe_local.offload.kernels.layer import LayerKernels
from moe_local.offload.native.library import library
from moe_local.offload.quantize.codec import decoder_for
from moe_local.offload.quantize.layout import Layout
from support import swiglu_experts

TOP_K = 3
FORMATS = ("nf4", "int8", "q3", "q2", "mxfp4", "fp8", "nvfp4", "nvfp4, divided")

LayoutOf = Callable[[str], Layout]

pytestmark = pytest.mark.skipif(library() is None, reason="the grouped kernels ask the library for gates")


@pytest.fixture
def layout_of() -> LayoutOf:
    made: LayoutOf = swiglu_experts.layout_of
    return made


class TorchKernels:
    """The grouped kernels by torch, launched as Triton's are: for slots that are numbered from `base` on."""

    def __init__(self, layout: Layout, spoil: Callable[[str, torch.Tensor], None] | None = None) -> None:
        self._layout = layout
        self._spoil = spoil or (lambda name, answers: None)
        self.up_kernel, self.down_kernel, self.combine_kernel = map(
            _Kernel, (self._up, self._down, self._sum)
        )

    def _weights(self, base: torch.Tensor) -> dict[str, torch.Tensor]:
        return decoder_for(self._layout.format).decode(base, self._layout, torch.float32)

    def _up(
        self, base: Any, stride: int, table: Any, x: Any, hidden: Any, *rest: Any, **options: Any
    ) -> None:
        for place in table[0, 1:].tolist():
            y = self._weights(base)["gate_up_proj"] @ x[place // options["TOP_K"]].t().reshape(-1)
            gate, up = y.chunk(2)
            hidden[place] = (F.silu(gate) * up).view(-1, x.shape[1]).t().reshape(-1)
        self._spoil("up", hidden)

    def _down(
        self, base: Any, stride: int, table: Any, hidden: Any, outputs: Any, *rest: Any, **_: Any
    ) -> None:
        planes = rest[-1]
        for place in table[0, 1:].tolist():
            outputs[place] = self._weights(base)["down_proj"] @ hidden[place].view(planes, -1).t().reshape(-1)
        self._spoil("down", outputs)

    def _sum(self, *arguments: Any, **options: Any) -> None:
        pass


class _Kernel:
    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._run


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """found(kernels, layout, dtype, base) -> what is wrong with them."""

    def find(kernels: Any, layout: Layout, dtype: torch.dtype, base: torch.Tensor) -> str | None:
        monkeypatch.setattr(grouped, "triton_kernels", lambda device: kernels)
        math, width = swiglu_experts.Math(), swiglu_experts.WIDTH
        launcher = grouped.GroupedExperts().launcher(math, torch.device("cpu"), layout)
        assert launcher is not None
        answers = LayerKernels().answers
        return fault(launcher, math=math, base=base, top_k=TOP_K, width=width, dtype=dtype, answers=answers)

    return find


@pytest.mark.parametrize(
    ("format", "dtype"),
    [*((format, torch.bfloat16) for format in FORMATS), ("nf4", torch.float32), ("int8", torch.float16)],
)
def test_right_kernels_of_every_format_pass_and_the_slot_is_as_it_was(
    found: Callable[..., str | None], layout_of: LayoutOf, format: str, dtype: torch.dtype
) -> None:
    layout = layout_of(format)
    base = torch.arange(layout.nbytes + 7).to(torch.uint8)
    before = base.clone()
    assert found(TorchKernels(layout), layout, dtype, base) is None
    assert torch.equal(base, before)


SPOILS: dict[str, Callable[[str, torch.Tensor], None]] = {
    "a column": lambda name, answers: answers[:, 5:9].zero_() if name == "up" else None,  # type: ignore[func-returns-value]
    "one token of four": lambda name, answers: (  # type: ignore[dict-item]
        answers[2 * TOP_K].mul_(1.2) if name == "down" and len(answers) > 2 * TOP_K else None
    ),
    "not a number": lambda name, answers: answers[0, :1].fill_(torch.nan) if name == "down" else None,  # type: ignore[func-returns-value]
    "zeros": lambda name, answers: answers.zero_(),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_wrong_kernels_are_found_out(
    found: Callable[..., str | None], layout_of: LayoutOf, spoil: str
) -> None:
    layout = layout_of("nf4")
    kernels = TorchKernels(layout, SPOILS[spoil])
    reason = found(kernels, layout, torch.bfloat16, torch.zeros(layout.nbytes, dtype=torch.uint8))
    assert reason is not None
    assert "of their norm, where 0.05 is allowed" in reason


@pytest.mark.parametrize("format", FORMATS)
def test_a_scale_taken_from_the_neighbour_is_noticed(
    found: Callable[..., str | None], layout_of: LayoutOf, format: str
) -> None:
    """What is made up has no two scales alike."""
    layout = layout_of(format)
    shifted = TorchKernels(layout)
    segment = next(s for s in layout.segments if s.part in ("absmax", "scale") and s.name == "down_proj")
    weights = shifted._weights

    def neighbour(base: torch.Tensor) -> dict[str, torch.Tensor]:
        base = base.clone()
        part = base[segment.offset : segment.offset + segment.nbytes]
        part.copy_(part.roll(segment.nbytes // max(1, torch.Size(segment.shape).numel())))
        return weights(base)

    shifted._weights = neighbour  # type: ignore[method-assign]
    base = torch.zeros(layout.nbytes, dtype=torch.uint8)
    assert "of their norm" in str(found(shifted, layout, torch.float32, base))


class Broken:
    def __init__(self, error: Exception) -> None:
        self._error = error
        self.up_kernel = self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        raise self._error


def test_what_does_not_compile_is_not_used_and_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two layers with experts in two formats; those in the other format are served."""
    nf4, int8 = map(swiglu_experts.layout_of, ("nf4", "int8"))
    broken = Broken(RuntimeError("Internal Triton PTX codegen error\nand more"))
    monkeypatch.setattr(grouped, "triton_kernels", lambda device: broken)
    served: list[Any] = []
    real = grouped_trial.fault

    def only_nf4(launcher: Launcher, *arguments: Any, **options: Any) -> str | None:
        served.append(launcher.layout.format)
        return real(launcher, *arguments, **options) if launcher.layout is nf4 else None

    monkeypatch.setattr(grouped_trial, "fault", only_nf4)
    slot = torch.zeros(max(nf4.nbytes, int8.nbytes), dtype=torch.uint8)
    runner = swiglu_experts.runner_of([[nf4, int8], [nf4]], [TOP_K, TOP_K], [slot, slot])
    modules: Any = [swiglu_experts.Math(0), swiglu_experts.Math(1)]
    with caplog.at_level(logging.WARNING):
        runner.warm_up(modules, swiglu_experts.WIDTH, torch.bfloat16)
    assert served == ["nf4", "int8"]
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith("do not do: RuntimeError: Internal Triton PTX codegen error")
    launcher = runner.grouped.launcher
    assert [launcher(modules[1], torch.device("cpu"), layout) is None for layout in (nf4, int8)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("helps", [True, False])
def test_kernels_that_are_wrong_with_shuffles_are_tried_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, helps: bool
) -> None:
    layout, device, tried = swiglu_experts.layout_of("nf4"), torch.device("cpu"), []

    class Kernels(TorchKernels):
        def _up(self, *arguments: Any, **options: Any) -> None:
            tried.append(options["SHUFFLES"])
            super()._up(*arguments, **options)
            if options["SHUFFLES"] or not helps:
                arguments[4].zero_()

    monkeypatch.setattr(grouped, "triton_kernels", lambda device: Kernels(layout))
    monkeypatch.setattr(grouped, "can_shuffle", lambda device: True)
    experts, math = grouped.GroupedExperts(), swiglu_experts.Math()
    base = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for _ in range(2):
        if experts.launcher(math, device, layout) is not None:
            options: Any = {"top_k": TOP_K, "width": swiglu_experts.WIDTH, "dtype": torch.float32}
            grouped_trial.try_out(experts, layout, math=math, base=base, **options)
    assert tried == [True] * 4 + [False] * (8 if helps else 4)
    assert (experts.launcher(math, device, layout) is not None) == helps
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == (not helps)


def test_a_layout_that_is_wrong_with_shuffles_leaves_them_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose kernels without any were neither tried nor compiled."""
    nf4, q3 = map(swiglu_experts.layout_of, ("nf4", "q3"))
    tried: list[tuple[str, bool]] = []

    def only_q3(launcher: Launcher, **options: Any) -> str | None:
        shuffles = launcher._up["SHUFFLES"]
        tried.append((launcher.layout.format, shuffles))
        return "wrong" if shuffles and launcher.layout is q3 else None

    monkeypatch.setattr(grouped_trial, "fault", only_q3)
    monkeypatch.setattr(grouped, "triton_kernels", lambda device: object())
    monkeypatch.setattr(grouped, "can_shuffle", lambda device: True)
    slot = torch.zeros(nf4.nbytes, dtype=torch.uint8)
    runner, math = swiglu_experts.runner_of([[nf4, q3]], [TOP_K], [slot]), swiglu_experts.Math()
    runner.warm_up([math], swiglu_experts.WIDTH, torch.bfloat16)
    assert tried == [("nf4", True), ("q3", True), ("q3", False)]
    for layout, shuffles in ((nf4, True), (q3, False)):
        launcher = runner.grouped.launcher(math, torch.device("cpu"), layout)
        assert launcher._up["SHUFFLES"] == launcher._down["SHUFFLES"] == shuffles


def test_a_lack_of_memory_is_no_fault_of_the_kernels(
    found: Callable[..., str | None], layout_of: LayoutOf
) -> None:
    layout = layout_of("nf4")
    broken, base = Broken(torch.OutOfMemoryError("CUDA out of memory")), torch.zeros(layout.nbytes).byte()
    with pytest.raises(torch.OutOfMemoryError):
        found(broken, layout, torch.bfloat16, base)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_made_up_is_about_as_large_as_a_models_weights(layout_of: LayoutOf, format: str) -> None:
    layout = layout_of(format)
    for weight in decoder_for(layout.format).decode(made_expert(layout), layout, torch.float32).values():
        assert 0.003 < float(weight.square().mean().sqrt()) < 0.3
        assert weight.isfinite().all()
