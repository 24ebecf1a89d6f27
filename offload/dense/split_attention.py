"""Attention of few queries to long rows of keys, by torch's fused kernels, a row cut into parts.

CUDA's kernel that takes a mask gives each head of keys one thread block, which reads the whole row: 8 blocks
for Mixtral, on GPUs of a hundred and more processors, each of which gets a small share of the memory's
bandwidth. Parts of a row are as good as more heads; what they give is put together by the logarithms of
their sums (as in Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

from functools import cache

import torch

FEWEST_KEYS = 256
"""Of a part: to put parts together takes some five small operations."""


def parts_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Into how many parts to cut key and value, [B, H, S, D], for `query`, [B, H, T, D].

    So many that each processor of a GPU has one to read, as far as they divide S; 1 on a CPU, whose kernels
    share long rows among threads. A matter of shapes and of the device, so each token is computed one way.
    """
    batch, heads, keys, _ = key.shape
    if not query.is_cuda:
        return 1
    wanted = min(-(-_processors(query.device) // (batch * heads)), keys // FEWEST_KEYS)
    if wanted < 2 or not _has_kernel(query, key, value):
        return 1
    return max((n for n in range(2, wanted + 1) if keys % n == 0), default=1)


def _has_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` takes these on a GPU.

    There is no kernel for bf16 before compute capability 8.0, where torch's sdpa multiplies matrices instead,
    nor for some widths of heads.
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

    `seen`: [B, 1, 1, S], the same for all T queries (as of heads that share keys), or None. `sinks`: fp32
    [H, T], as for `beside_sinks`, or None. Returns [B, H, T, D], fp32 but for one part without sinks. Who
    sees nothing gets numbers.
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
        if seen.dtype != torch.bool:  # what a model adds may be -inf
            seen = seen.clamp(min=_least(seen.dtype))
        bias = bias_of(seen if len(seen) == 1 else seen.repeat_interleave(heads, dim=0), query, seen.shape[3])
    output, logsumexp = attend(query, key, value, bias, False, scale)
    if sinks is not None:  # one more part, whose answer is zero
        logsumexp = torch.cat([logsumexp, sinks.expand(batch, -1, -1).flatten(0, 1)[:, None]], dim=1)
    shares = logsumexp.softmax(1)[:, :parts]
    joined: torch.Tensor = (output * shares[..., None]).sum(1).unflatten(0, (batch, heads))
    return joined


def beside_sinks(output: torch.Tensor, logsumexp: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What `attend` gave, [B, H, T, D], had a number without a value taken part in each softmax: `sinks`,
    fp32 [H, T], or [H, 1] where a head's queries have the same. Returns fp32.

    With L the logarithm of a query's sum and a sink s, that is exp(L) / (exp(L) + exp(s)) of what it was.
    """
    return output * torch.sigmoid(logsumexp - sinks)[..., None]


def bias_of(seen: torch.Tensor, query: torch.Tensor, keys: int) -> torch.Tensor:
    """What is added to scores, [B, H, T, keys], of which heads and, where it says the same to all, queries
    share the memory: rows of it begin at multiples of 16 numbers, as CUDA's kernel asks for. `seen`: bool,
    or what is added, which on a GPU is taken as it is if its rows do so (the CPU's kernel errs where a whole
    row is -inf)."""
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
    """What is added to the score of a key that is not seen.

    Not -inf: padding may see nothing at all. And no number that CUDA's kernel makes -inf of, by multiplying
    with log2(e): of a part that is all hidden it gives 0 then for the logarithm of its sum.
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
    """What torch's sdpa gives, [B, H, T, D], and the logarithms of its sums, fp32 [B, H, T]."""
    if query.device.type == "cpu":
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        return output, logsumexp
    output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, causal, scale=scale
    )
    return output, logsumexp[..., : query.shape[2]]
