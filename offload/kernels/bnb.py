"""NF4 on CUDA through bitsandbytes' fused 4-bit matrix product, reading the expert's bytes in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.code_tables import dynamic_map
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.quantize.nf4 import BLOCK, nf4_matrix
from moe_local.offload.quantize.views import segment_view


def nf4_linear(
    buffer: torch.Tensor, layout: Layout, dtype: torch.dtype, has_bias: bool
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """Linear over the NF4 matrices of an expert in device memory; x and the result are in `dtype`.

    bitsandbytes chooses by the number of tokens between its fused kernel and dequantizing into a
    temporary matrix followed by a GEMM. Runs on the current stream, without a host sync.
    """
    ops = bitsandbytes_ops()
    code = dynamic_map(buffer.device)
    biases = {
        name: segment_view(buffer, segment).to(dtype)
        for name in (f"{tensor.name}_bias" for tensor in layout.tensors)
        if has_bias
        for segment in layout.parts(name)
    }

    matrices = {
        tensor.name: nf4_matrix(buffer, layout, tensor.name)
        for tensor in layout.tensors
        if len(tensor.shape) == 2
    }

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        m = matrices[name]
        bias = biases.get(f"{name}_bias")
        return ops.gemm_4bit.default(  # type: ignore[no-any-return]
            x, m.q, list(m.shape), m.absmax_scale, BLOCK, "nf4", bias, m.absmax, code, m.offset
        )

    return linear
