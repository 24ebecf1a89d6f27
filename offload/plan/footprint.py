"""How many bytes each part of a loaded model takes, from its shape alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.native.library import FORMATS, library
from moe_local.offload.quantize.codec import NATIVE, codec_for
from moe_local.offload.quantize.layout import TensorSpec
from moe_local.offload.quantize.mix import Mix, even_mix, is_mixed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

PREFILL_CHUNK = 2048
"""Prompt tokens in one forward. Offloaded prefill reads every absent expert once per chunk, so a prompt of P
tokens moves P / chunk times their bytes; but a chunk's workspace takes the place of slots, for which every
decoded token pays. For prompts of 2048 tokens, chunks of 2048 move least: half as much as chunks of 1024, for
a 100th of Mixtral's slots on a 24 GB card, which equals the misses of some 70 decoded tokens. With far
shorter chunks, too, reading is hidden behind computing."""

MAX_CHUNK = 8192
WORKSPACE_SHARE = 1 / 128
"""Chunks are longer than PREFILL_CHUNK, up to MAX_CHUNK, if that enlarges the workspace by at most this share
of all experts' bytes: in models of hundreds of GB, of which every chunk reads most."""

STAGING_SLOTS = 2
STAGING_BYTES = 32 * 2**20
STAGING_SHARE = 1 / 4
"""The staging slots through which prompts stream experts: STAGING_SLOTS, so that one loads while the other is
computed (with 3 or 4 slots for large experts, prompts took as long as with 2, benchmarks/prefill.py). Small
experts get more slots, up to STAGING_BYTES, since each expert costs the host some time, but not more than
STAGING_SHARE of a layer's experts, unless that is fewer than STAGING_SLOTS."""

MIN_CHUNK = 32
"""Fewest prompt tokens in a chunk: shorter ones would read every expert for hardly any tokens."""

SNAPSHOTS = 4
"""Copies in RAM of each sequence's states, from which later prompts go on: those of earlier prompts of a
conversation, and of what conversations have in common."""

MOST_SHELVED = 8 * 2**30
"""Most bytes of RAM for conversations whose rows others need."""

CUDA_OVERHEAD = 512 * 2**20
"""Bytes that a CUDA process takes besides its tensors: the context, loaded kernels, cuBLAS workspaces, slack
of torch's allocator, graphs. For small budgets, a sixteenth of the budget is assumed."""


def compute_dtype(spec: ModelSpec, dense: str) -> torch.dtype:
    """The dtype of activations, of the KV cache and of all dense weights that stay unquantized."""
    if dense == "auto":
        return spec.dtype
    return DTYPES.get(dense, torch.bfloat16)


@lru_cache(maxsize=128)
def expert_sizes(spec: ModelSpec, experts: str, mix: Mix | None = None) -> tuple[tuple[int, ...], ...]:
    """Bytes of every expert of each MoE layer. For "mixed:BITS" without its `mix`, bits are assumed to be
    spread evenly. Raises OptionError for bits that no combination of formats gives."""
    if not is_mixed(experts):
        sizes = expert_bytes(spec, experts)
        return tuple((size,) * layer.num_experts for size, layer in zip(sizes, spec.layers, strict=True))
    layouts = (mix or even_mix(experts, spec)).layouts(spec)
    return tuple(tuple(layout.nbytes for layout in layer) for layer in layouts)


def expert_bytes(spec: ModelSpec, experts: str) -> tuple[int, ...]:
    """Bytes of one expert of each MoE layer where all have format `experts`."""
    if experts == NATIVE:
        return tuple(spec.stored.layout(layer.tensors).nbytes for layer in spec.layers)
    return tuple(_expert_bytes(experts, layer.tensors) for layer in spec.layers)


@lru_cache(maxsize=256)
def _expert_bytes(experts: str, tensors: tuple[TensorSpec, ...]) -> int:
    return codec_for(experts).layout(tensors).nbytes


def dense_bytes(spec: ModelSpec, dense: str, *, cuda: bool) -> int:
    """Bytes of all weights outside the routed experts, loaded with `dense` on CUDA or on the CPU."""
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
    """Bytes of a weight in bitsandbytes' Linear4bit with double-quantized scales, or in Linear8bitLt."""
    numel = tensor.numel
    if dense == "int8":
        return numel + 4 * tensor.shape[0]
    scales = -(-numel // 64)
    return -(-numel // 2) + scales + 4 * -(-scales // 256) + 4 + 4 * (256 + 16)


def kv_bytes(spec: ModelSpec, context: int, dtype: torch.dtype) -> int:
    """Bytes of a sequence's keys and values for `context` tokens, in `dtype`, and of its states, in fp32."""
    return spec.kv_numel_per_token * context * dtype.itemsize + 4 * spec.state_numel


def snapshot_bytes(spec: ModelSpec) -> int:
    """Bytes of RAM for the snapshots of a sequence's states."""
    return SNAPSHOTS * 4 * spec.state_numel


def workspace_bytes(
    spec: ModelSpec, chunk: int, context: int, dtype: torch.dtype, *, in_place: bool = False
) -> int:
    """Peak bytes that a forward of T = `chunk` prompt tokens needs besides weights and KV cache.

    `in_place`: kernels read experts as they are stored (`reads_in_place`), so none is dequantized. Attention
    and experts run one after the other, so the larger counts. Letters: D hidden, K top-k, S context, V
    vocabulary, X keys and values of one layer expanded to all heads (per token), c bytes of the dtype.

        both       4 T D c                 residual, normed input, block output, their sum
                   V (c + 2 * 4)           logits of one position, in fp32 for sampling, and sampled from
        attention  2 T X c                 queries before and after rotation, output before and after o_proj
                   S X c                   keys and values repeated or projected to every head
                   T S (1 + c)             mask as booleans and as the kernel's addend
        experts    T K D (c + 4)           outputs by rank, and weighted in fp32
                   expert_numel c          one expert dequantized, unless `in_place`
                   T sum(in + out) c       inputs and outputs of its matrices, if it got all tokens
    """
    tokens = min(chunk, context)
    width = dtype.itemsize
    attention = (2 * tokens + context) * spec.expanded_kv_numel_per_token * width
    attention += tokens * context * (1 + width)
    experts = max(
        tokens * layer.top_k * spec.hidden_size * (width + 4)
        + (0 if in_place else layer.expert_numel * width)
        + tokens * sum(sum(tensor.shape) for tensor in layer.tensors if len(tensor.shape) == 2) * width
        for layer in spec.layers
    )
    both = 4 * tokens * spec.hidden_size * width + spec.vocab_size * (width + 8)
    return both + max(attention, experts)


def reads_in_place(spec: ModelSpec, experts: str, mix: Mix | None = None) -> bool:
    """Whether this machine's CPU multiplies with experts in format `experts` without dequantizing them."""
    formats = {experts}
    if is_mixed(experts):
        formats = {*(mix or even_mix(experts, spec)).counts()}
    if experts == NATIVE:
        formats = {spec.stored.layout(layer.tensors).format for layer in spec.layers}
    return formats <= FORMATS.keys() and library() is not None


def longest_chunk(spec: ModelSpec, context: int, dtype: torch.dtype, experts_total: int) -> int:
    """Prompt tokens in one forward if memory is no limit; depends on the model alone, not on a budget."""
    least = workspace_bytes(spec, PREFILL_CHUNK, context, dtype)
    chunk = PREFILL_CHUNK
    while chunk < min(context, MAX_CHUNK):
        if workspace_bytes(spec, 2 * chunk, context, dtype) - least > WORKSPACE_SHARE * experts_total:
            break
        chunk *= 2
    return min(context, chunk)


def staging_slots(spec: ModelSpec, expert: int) -> int:
    """Slots of a staging ring for experts of at most `expert` bytes, if memory is no limit."""
    most = max(STAGING_SLOTS, int(STAGING_SHARE * spec.num_experts))
    return min(most, max(STAGING_SLOTS, -(-STAGING_BYTES // expert)))


def cuda_overhead(budget: int) -> int:
    """The part of a VRAM budget that is reserved for the CUDA process itself."""
    return min(CUDA_OVERHEAD, budget // 16)


def with_cuda_overhead(nbytes: int) -> int:
    """The smallest VRAM budget that has room for `nbytes` beside its own `cuda_overhead`."""
    return nbytes + min(CUDA_OVERHEAD, (nbytes - 1) // 15)
