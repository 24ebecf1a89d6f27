"""gpu_kernels.py where there is no GPU: it counts bytes right."""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace

import gpu_kernels
import pytest
import torch

from moe_local.offload.quantize.codec import decoder_for
from moe_local.offload.quantize.layout import TensorSpec


@pytest.mark.parametrize("format", gpu_kernels.FORMATS)
def test_random_experts_decode_to_weights(format: str) -> None:
    specs = [TensorSpec("gate_up_proj", (128, 64)), TensorSpec("down_proj", (64, 64))]
    layout, decoder = gpu_kernels.layout_of(format, specs), decoder_for(format)
    leases = gpu_kernels.random_experts(layout, 3, torch.device("cpu"))
    decoded = [decoder.decode(lease.buffer, layout, torch.float32)["down_proj"] for lease in leases]
    assert all(0.001 < float(weights.std()) < 0.1 for weights in decoded)
    assert not torch.equal(decoded[0], decoded[1])


def test_figures() -> None:
    row = gpu_kernels.row([1e-3] * 8, 10**9, [2e12] * 8)
    assert row["gb_per_s"] == pytest.approx(1000)
    assert row["share_of_read"]["median"] == pytest.approx(0.5)
    assert set(gpu_kernels.row([1e-6], 0, [1e12])) == {"us"}


def test_what_a_graph_reads_lives_as_long_as_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed, it would be overwritten by what the other contenders allocate."""
    replays: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append("")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    table = torch.ones(3)
    seen = weakref.ref(table)
    replay = gpu_kernels.graph_of(lambda table=table: table.sum())
    del table
    replay()
    assert replays == [""]
    assert seen() is not None
    del replay
    assert seen() is None
