"""gpu_kernels.py where there is no GPU: it counts bytes right."""

from __future__ import annotations

import gpu_kernels
import pytest
import torch

from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec


def test_random_experts_decode_to_weights() -> None:
    specs = [TensorSpec("gate_up_proj", (128, 64)), TensorSpec("down_proj", (64, 64))]
    layout = codec_for("nf4").layout(specs)
    leases = gpu_kernels.random_experts(layout, 3, torch.device("cpu"))
    decoded = [codec_for("nf4").decode(lease.buffer, layout, torch.float32)["down_proj"] for lease in leases]
    assert all(0.001 < float(weights.std()) < 0.1 for weights in decoded)
    assert not torch.equal(decoded[0], decoded[1])


def test_figures() -> None:
    row = gpu_kernels.row([1e-3] * 8, 10**9, [2e12] * 8)
    assert row["gb_per_s"] == pytest.approx(1000)
    assert row["share_of_read"]["median"] == pytest.approx(0.5)
    assert set(gpu_kernels.row([1e-6], 0, [1e12])) == {"us"}
