"""gpu_attention.py where there is no GPU: it compares what is the same."""

from __future__ import annotations

import gpu_attention
import pytest
import torch


def test_contenders_attend_to_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "SLAB_BYTES", 1 << 20)
    bench = gpu_attention.Bench("qwen3-30b-a3b", 64, torch.device("cpu"))
    assert bench.nbytes == 2 * 4 * 64 * 128 * 2
    bench.parts = 4
    assert 0 < bench.check() < gpu_attention.ERROR_LIMIT
    calls = bench.contenders()
    assert {name: len(call()) for name, call in calls.items()} == dict.fromkeys(calls, gpu_attention.LAUNCHES)
    bench._mask.zero_()
    row = bench._rows[1]
    assert torch.allclose(bench._plain(*row).flatten(), bench._whole(*row).flatten(), atol=2e-2)
