"""NF4 on CUDA through bitsandbytes' 4-bit matrix product, which reads the expert's bytes in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.gpu.relief import shortage
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.code_tables import dynamic_map
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.nf4 import BLOCK, nf4_matrix
from moe_local.offload.quantize.views import segment_view


def nf4_linear(
    buffer: torch.Tensor, layout: Layout, dtype: torch.dtype, has_bias: bool
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """A linear function over the NF4 matrices of an expert in device memory; x and the result are in `dtype`.

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


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise MoeLocalError if bitsandbytes cannot multiply, as with a CUDA that it has no library for.

    Otherwise the first prompt would fail, with pages of error messages.
    """
    layout = codec_for("nf4").layout([TensorSpec("w", (BLOCK, BLOCK))])
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    segment_view(buffer, next(part for part in layout.segments if part.part == "offset")).fill_(1)
    try:  # q is zeros, so every weight is the first level, -1, times a scale of 1
        sums = nf4_linear(buffer, layout, dtype, False)(torch.ones(1, BLOCK, dtype=dtype, device=device), "w")
        wrong = None if bool((sums == -BLOCK).all()) else f"{BLOCK} times -1 is {float(sums[0, 0])}"
    except Exception as error:
        if shortage(error) is not None:
            raise
        wrong = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    if wrong is not None:
        raise MoeLocalError(
            f"bitsandbytes, which computes prompts, does not run on {device}: {wrong}; pip install --upgrade "
            'bitsandbytes, see what python -m bitsandbytes says, or use experts="int8"'
        )
