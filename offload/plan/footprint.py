"""How many bytes each part of a loaded model takes, from its shape alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

PREFILL_CHUNK = 2048
"""Most prompt tokens in one forward. Offloaded prefill reads every expert once a chunk, so chunks should be
long (engines of this kind gain up to 5 times from 512 to 8192); 2048 keeps the workspace below 1 GiB."""

MIN_CHUNK = 32
"""Shorter chunks would read every expert for hardly more tokens than it has weights to give."""

CUDA_OVERHEAD = 512 * 2**20
"""What a CUDA process takes beside its tensors: the context, loaded kernels, cuBLAS workspaces, slack of
torch's allocator. Of small budgets a sixteenth."""


def compute_dtype(spec: ModelSpec, dense: str) -> torch.dtype:
    """The dtype of activations, of the KV cache and of all dense weights that stay unquantized."""
    if dense == "auto":
        return spec.dtype
    return DTYPES.get(dense, torch.bfloat16)


def expert_bytes(spec: ModelSpec, experts: str) -> tuple[int, ...]:
    """Bytes of one expert of each MoE layer in format `experts`: the stride of that layer's slots."""
    return tuple(_expert_bytes(experts, layer.tensors) for layer in spec.layers)


@lru_cache(maxsize=256)
def _expert_bytes(experts: str, tensors: tuple[TensorSpec, ...]) -> int:
    return codec_for(experts).layout(tensors).nbytes


def dense_bytes(spec: ModelSpec, dense: str, *, cuda: bool) -> int:
    """Bytes of every weight that is no routed expert's, loaded with `dense` on CUDA or on the CPU."""
    return sum(tensor_bytes(spec, dense, cuda=cuda))


def tensor_bytes(spec: ModelSpec, dense: str, *, cuda: bool) -> Iterator[int]:
    """The same for each of `spec.dense`, in order."""
    width = compute_dtype(spec, dense).itemsize
    quantized = spec.quantized(dense, cuda=cuda)

    def nbytes(tensor: TensorSpec) -> int:
        if tensor.name in quantized:
            return _bitsandbytes_bytes(tensor, dense) if cuda else _expert_bytes(dense, (tensor,))
        if not cuda and f"{tensor.name.removesuffix('.bias')}.weight" in quantized:
            return 4 * tensor.numel
        return width * tensor.numel

    return (nbytes(tensor) for tensor in spec.dense)


def _bitsandbytes_bytes(tensor: TensorSpec, dense: str) -> int:
    """Linear4bit with double-quantized scales, or Linear8bitLt: its tensors' sizes."""
    numel = tensor.numel
    if dense == "int8":
        return numel + 4 * tensor.shape[0]
    scales = -(-numel // 64)
    return -(-numel // 2) + scales + 4 * -(-scales // 256) + 4 + 4 * (256 + 16)


def kv_bytes(spec: ModelSpec, context: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one sequence of `context` tokens."""
    return spec.kv_numel_per_token * context * dtype.itemsize


def workspace_bytes(spec: ModelSpec, chunk: int, context: int, dtype: torch.dtype) -> int:
    """Bytes that a forward of T = `chunk` prompt tokens needs at its widest point, beside weights and KV.

    Attention and experts follow each other, so the larger counts. Letters: D hidden, K top-k, S context,
    V vocabulary, X keys and values of one layer spread over all heads (per token), c bytes of the dtype.

        both       4 T D c                 residual, normed input, block output, their sum
                   V (c + 2 * 4)           logits of one position, in fp32 for sampling, and sampled from
        attention  2 T X c                 queries before and after rotation, output before and after o_proj
                   S X c                   keys and values repeated or projected to every head
                   T S (1 + c)             mask as booleans and as the kernel's addend
        experts    T K D (c + 4)           outputs by rank, and weighted in fp32
                   expert_numel c          one expert dequantized
                   T sum(in + out) c       inputs and outputs of its matrices, were all tokens its own
    """
    tokens = min(chunk, context)
    width = dtype.itemsize
    attention = (2 * tokens + context) * spec.expanded_kv_numel_per_token * width
    attention += tokens * context * (1 + width)
    experts = max(
        tokens * layer.top_k * spec.hidden_size * (width + 4)
        + layer.expert_numel * width
        + tokens * sum(sum(tensor.shape) for tensor in layer.tensors if len(tensor.shape) == 2) * width
        for layer in spec.layers
    )
    both = 4 * tokens * spec.hidden_size * width + spec.vocab_size * (width + 8)
    return both + max(attention, experts)


def cuda_overhead(budget: int) -> int:
    """The part of a VRAM budget that is left to the CUDA process itself."""
    return min(CUDA_OVERHEAD, budget // 16)


def with_cuda_overhead(nbytes: int) -> int:
    """The smallest VRAM budget that has room for `nbytes` beside its own `cuda_overhead`."""
    return nbytes + min(CUDA_OVERHEAD, (nbytes - 1) // 15)
