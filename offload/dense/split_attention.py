"""Attention of few queries to long rows of keys, by torch's fused kernels, with each row cut into parts.

The CUDA kernel that takes a mask gives each key head one thread block, which reads the whole row: 8 blocks
for Mixtral, on GPUs with a hundred or more multiprocessors, each of which gets a small share of the memory's
bandwidth. Here the parts of a row are passed as if they were more heads, and their outputs are combined with
the logsumexp of each part (as in Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

from functools import cache

import torch

FEWEST_KEYS = 256
"""Fewest keys in a part, since combining the parts takes some five small operations."""


def parts_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Into how many parts to cut key and value, [B, H, S, D], for `query`, [B, H, T, D].

    As many as give each multiprocessor of a GPU a part to read, as far as they divide S; 1 on a CPU, whose
    kernels share long rows among threads. Depends only on shapes and the device, so a token is always
    computed in the same way.
    """
    batch, heads, keys, _ = key.shape
    if not query.is_cuda:
        return 1
    wanted = min(-(-_processors(query.device) // (batch * heads)), keys // FEWEST_KEYS)
    if wanted < 2 or not _has_kernel(query, key, value):
        return 1
    return max((n for n in range(2, wanted + 1) if keys % n == 0), default=1)


def _has_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` supports these tensors on a GPU.

    There is no kernel for bf16 before compute capability 8.0, where torch's sdpa falls back to plain matrix
    products, nor for some head widths.
    """
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return torch.backends.cuda.can_use_efficient_attention(parameters)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def attend_in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float | None,
    parts: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of query [B, H, T, D] to key and value [B, H, S, D], `parts` a divisor of S.

    `seen`: [B, 1, 1, S], the same for all T queries (which may be heads that share keys), or None. `sinks`:
    fp32 [H, T], as for `beside_sinks`, or None. Returns [B, H, T, D], in fp32 except for one part without
    sinks. The output of a query that sees no key is finite.
    """
    batch, heads = query.shape[:2]
    if parts == 1:
        bias = None if seen is None else bias_of(seen, query, key.shape[2])
        output, logsumexp = attend(query, key, value, bias, False, scale)
        return output if sinks is None else beside_sinks(output, logsumexp, sinks)
    key, value = (x.unflatten(2, (parts, -1)).flatten(0, 1) for x in (key, value))  # [B * H, parts, ., D]
    query = query.flatten(0, 1)[:, None].expand(-1, parts, -1, -1)
    bias = None
    if seen is not None:
        seen = seen.view(len(seen), parts, 1, -1)
        if seen.dtype != torch.bool:  # a model's mask may add -inf
            seen = seen.clamp(min=_least(seen.dtype))
        bias = bias_of(seen if len(seen) == 1 else seen.repeat_interleave(heads, dim=0), query, seen.shape[3])
    output, logsumexp = attend(query, key, value, bias, False, scale)
    if sinks is not None:  # the sinks are one more part, whose output is zero
        logsumexp = torch.cat([logsumexp, sinks.expand(batch, -1, -1).flatten(0, 1)[:, None]], dim=1)
    shares = logsumexp.softmax(1)[:, :parts]
    joined: torch.Tensor = (output * shares[..., None]).sum(1).unflatten(0, (batch, heads))
    return joined


def beside_sinks(output: torch.Tensor, logsumexp: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The output of `attend`, [B, H, T, D], as if each softmax had one more score that has no value: `sinks`,
    fp32 [H, T], or [H, 1] where a head's queries share one. Returns fp32.

    With L the logsumexp of a query and s its sink, the output is scaled by exp(L) / (exp(L) + exp(s)).
    """
    return output * torch.sigmoid(logsumexp - sinks)[..., None]


def bias_of(seen: torch.Tensor, query: torch.Tensor, keys: int) -> torch.Tensor:
    """The bias that is added to scores, [B, H, T, keys], expanded over heads and, where `seen` has one row
    for all, over queries. Its rows start at multiples of 16 numbers, as the CUDA kernel requires. `seen`:
    bool, or numbers to add, which on a GPU are used without a copy if their rows are aligned so (on the CPU
    they are clamped, since its kernel errs where a whole row is -inf)."""
    if query.is_cuda and seen.dtype == query.dtype and keys % 16 == 0 and seen.is_contiguous():
        return seen.expand(*query.shape[:3], keys)
    shape = (*seen.shape[:-1], -(-keys // 16) * 16)
    least = _least(query.dtype)
    rows = torch.full(shape, least, dtype=query.dtype, device=query.device)[..., :keys]
    if seen.dtype == torch.bool:
        rows.masked_fill_(seen, 0)
    else:
        rows.copy_(seen).clamp_(min=least)
    return rows.expand(*query.shape[:3], keys)


def _least(dtype: torch.dtype) -> float:
    """The number that is added to the score of a hidden key.

    It is not -inf, since padding may see no key at all. Nor does it become -inf when the CUDA kernel
    multiplies it by log2(e): for a part whose keys are all hidden, the kernel would then return a logsumexp
    of 0.
    """
    return torch.finfo(dtype).min / 2


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of torch's sdpa, [B, H, T, D], and the logsumexp of each query's scores, fp32 [B, H, T]."""
    if query.device.type == "cpu":
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        return output, logsumexp
    output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, causal, scale=scale
    )
    return output, logsumexp[..., : query.shape[2]]
