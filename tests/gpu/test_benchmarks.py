"""Benchmarks that capture graphs of their own, on small shapes: what runs between replays must spoil none."""

from __future__ import annotations

import json
from collections.abc import Callable

import device_misses
import gpu_attention
import gpu_kernels
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, object]]:
    """The object in the last line of what was printed."""
    pytest.importorskip("triton")
    return lambda: json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("tokens", [1, 4])
def test_kernels(
    monkeypatch: pytest.MonkeyPatch, printed: Callable[[], dict[str, object]], tokens: int
) -> None:
    monkeypatch.setitem(gpu_kernels.SHAPES, "qwen3-30b-a3b", gpu_kernels.Shape(128, 64, 16, 4))
    steps: list[torch.Tensor] = []
    run = gpu_kernels.Bench._run

    def keep(self: gpu_kernels.Bench, *step: object) -> torch.Tensor:
        steps.append(run(self, *step))  # type: ignore[arg-type]
        return steps[-1]

    monkeypatch.setattr(gpu_kernels.Bench, "_run", keep)
    gpu_kernels.main(["--models", "qwen3-30b-a3b", "--tokens", str(tokens), "--rounds", "2"])
    assert all(step.isfinite().all() for step in steps)
    (case,) = printed()["cases"]  # type: ignore[misc]
    assert {"up", "up, loads", "down", "combine", "step", "one by one"} == case["kernels"].keys()


def test_misses_of_the_device(
    printed: Callable[[], dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_misses, "NBYTES", 4096)
    device_misses.main(["--rounds", "2"])
    assert {"by", "look_up_us", "empty_us"} <= printed().keys()


def test_attention_to_long_rows(
    monkeypatch: pytest.MonkeyPatch, printed: Callable[[], dict[str, object]]
) -> None:
    monkeypatch.setattr(gpu_attention, "SLAB_BYTES", 1 << 20)
    gpu_attention.main(["--models", "qwen3-30b-a3b", "--columns", "1024", "--rounds", "2"])
    assert printed()["cases"]
