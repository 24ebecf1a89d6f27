"""gpu_kernels.py where there is no GPU: it counts bytes right."""

from __future__ import annotations

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
