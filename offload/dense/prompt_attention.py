"""Attention of many queries in CPU memory, in one call of the library, at twice the speed of torch's kernel.

torch's kernel multiplies 16-bit numbers no faster than floats, skips keys that are hidden only where queries
are as many as keys and causal, and takes neither sinks nor values that are narrower than keys.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from moe_local.offload.native.library import (
    DTYPES,
    ISAS,
    SCATTERED,
    PromptAttention,
    Strided,
    check,
    library,
    loaded_library,
)
from moe_local.offload.system.threads import kernel_threads

STEP = 16
"""The widths of heads must be multiples of it."""
FEWEST_ROWS = 12
"""With fewer queries, times the heads that share keys, torch is faster: keys are arranged for many."""


def prompt_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Attention of query [B, H, T, D] to key [B, H / G, S, D] and value [B, H / G, S, E]: a new [B, T, H, E].

    A query sees what `mask` [B or 1, 1, T, S] says, bool (True: seen); without one, query t sees the keys up
    to key t, or, unless `causal`, all. `sinks` [H] take part in the softmax and have no value. A query that
    sees nothing gets zeros.

    None if the library does not do this: for few queries, gradients, autocast, a scaling that is not
    positive, other devices, dtypes, sizes and masks, among them those in which the keys that a query sees do
    not lie together.
    """
    lib = library()
    if lib is None or not _is_served(query, key, value) or lib.moe_isa() == ISAS.index("portable"):
        return None
    if scaling is not None and not scaling > 0:
        return None
    seen = _seen(mask, query, key, causal)
    if seen is None:
        return None
    rows, heads, tokens, width = query.shape
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    answer = torch.empty(rows, tokens, heads, value.shape[3], dtype=query.dtype)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    prompt = PromptAttention(
        *(Strided(x.data_ptr(), *x.stride()[:3]) for x in (query, key, value)),
        *(seen.data_ptr(), None if sinks is None else sinks.data_ptr(), answer.data_ptr()),
        *(rows, tokens, key.shape[2], heads, key.shape[1], width, value.shape[3]),
        *(width**-0.5 if scaling is None else scaling, DTYPES[query.dtype]),
    )
    check(lib.moe_prompt_attention(ctypes.byref(prompt), kernel_threads()))
    return answer


def _is_served(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    tensors = query, key, value
    return (
        query.shape[2] > 1
        and query.shape[2] * query.shape[1] >= FEWEST_ROWS * key.shape[1]
        and query.dtype in DTYPES
        and all(x.is_cpu and x.dtype is query.dtype and not x.requires_grad for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and query.shape[3] == key.shape[3]
        and query.shape[3] % STEP == value.shape[3] % STEP == 0
        and key.shape[:3] == value.shape[:3]
        and key.shape[0] == query.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and all(x.numel() for x in tensors)
    )


def _seen(mask: Any, query: torch.Tensor, key: torch.Tensor, causal: bool) -> torch.Tensor | None:
    """The first key that each query sees, and the one after its last, int32 [B, T, 2]; None if it does not
    see all that lie between them."""
    rows, tokens, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        ends = torch.arange(1, tokens + 1, dtype=torch.int32).clamp(max=keys)
        ends = ends if causal else torch.full_like(ends, keys)
        return torch.stack([torch.zeros_like(ends), ends], dim=1).repeat(rows, 1, 1)
    if mask.dtype is not torch.bool or mask.dim() != 4 or not mask.is_cpu:
        return None
    if mask.shape[0] not in (1, rows) or mask.shape[1:] != (1, tokens, keys):
        return None
    mask = (mask[:1] if mask.stride(0) == 0 else mask).contiguous()
    seen = torch.empty(mask.shape[0], tokens, 2, dtype=torch.int32)
    status = loaded_library().moe_seen(mask.data_ptr(), mask.shape[0] * tokens, keys, seen.data_ptr())
    if status == SCATTERED:
        return None
    check(status)
    return seen if len(seen) == rows else seen.repeat(rows, 1, 1)
