from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_local.offload.gpu.device_tables import DeviceTables
from moe_local.offload.tiers import small_pins


def refused(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: out of memory")


def test_what_is_refused_once_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Windows refuses small pins after a large one."""
    asked: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor.numel())
        if len(asked) > 1:
            raise RuntimeError("CUDA error: resource already mapped\nand more")
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(small_pins, "_refused", False)
    numbers = torch.arange(4)
    first = small_pins.pinned(numbers)
    assert first is not numbers
    assert torch.equal(first, numbers)
    assert [small_pins.pinned(numbers) is numbers for _ in range(3)] == [True] * 3
    assert asked == [4, 4]
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith("CUDA error: resource already mapped")


def test_tables_of_a_device_do_without_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all experts could be pinned, and nothing more."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    monkeypatch.setattr(small_pins, "_refused", False)
    cache: Any = SimpleNamespace(slots=lambda layer: 4, expert_in=lambda layer, slot: None)
    tables = DeviceTables(cache, [8], [2], torch.device("cuda", 0))
    tables.fill([[2, 1]])
    assert tables.of[0].order.tolist() == [0, 2, 1, -1, -1]
