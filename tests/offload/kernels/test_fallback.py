from __future__ import annotations

import logging

import pytest
import torch

from moe_local.offload.kernels import cpu
from moe_local.offload.kernels.layer import LayerKernels
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec, make_layout
from support.expert_math import Math

TENSORS = (TensorSpec("gate_up_proj", (64, 32)), TensorSpec("down_proj", (32, 32)))


@pytest.mark.skipif(cpu.library() is None, reason="says something else, once, for all formats")
def test_of_several_layouts_each_that_no_kernel_reads_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    turned = [(tensor.name, "transposed", "bfloat16", tensor.shape[::-1]) for tensor in TENSORS]
    layouts = [make_layout("plain", TENSORS, turned), codec_for("nf4").layout(TENSORS)]
    kernels, math, x = LayerKernels(), Math(), torch.zeros(1, 32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert kernels.lead(math, x, layouts) in layouts
    (line,) = (record.message for record in caplog.records)
    assert "plain (transposed) take the reference path" in line
    assert "nf4" in line.partition(":")[2]  # the remedy
