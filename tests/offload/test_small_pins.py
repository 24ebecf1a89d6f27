from __future__ import annotations

import pytest
import torch

from moe_local.offload.tiers import small_pins


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
