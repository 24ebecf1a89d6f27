"""Attention of a single query, where torch is slow, or needs much memory, as transformers asks for it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_local.offload.class_source import class_source

NAME = "sdpa_single_query"
"""As which transformers knows `single_query_attention`."""


def use_single_query_attention(model: Any) -> None:
    """Let a transformers model that attends by torch's sdpa use `single_query_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.device.type not in ("cpu", "cuda") or model.config._attn_implementation != "sdpa":
        return
    kinds: set[Any] = set(map(type, model.modules()))
    if any(map(asks_for_its_name, kinds)):
        return
    AttentionInterface.register(NAME, single_query_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def asks_for_its_name(cls: Any) -> bool:
    """Whether the class looks at what its attention is called.

    The sparse attention of DeepSeek V3.2 and its like masks what the indexer left out for "eager" and "sdpa"
    only, and leaves that to an attention of any other name.
    """
    if not cls.__name__.endswith("Attention"):
        return False
    return re.search(r"_attn_implementation (in|not in|==|!=) ", class_source(cls)) is not None


def single_query_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' sdpa_attention_forward: query [B, H, T, D], key and value [B, H / G, S, D].

    Returns [B, T, H, D].

    One query whose G heads share keys is given to torch as G queries of one head: its kernel reads each key
    once then, and multiplies matrices instead of vectors. With 32 heads, 8 of keys, 1024 positions in bf16
    that took 0.7 instead of 8 ms on a CPU. Where there is a mask, transformers (5.17, later ones not) would
    copy the keys for every head; where there is none, a GPU has kernels for that.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    special = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    known = query.is_cpu if attention_mask is None else attention_mask.shape[1] == 1
    if groups == 1 or query.shape[2] != 1 or not known or special:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return attended
    batch, heads, _, width = query.shape
    packed = query.reshape(batch, heads // groups, groups, width)
    output = F.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, 1, heads, value.shape[-1]), None
