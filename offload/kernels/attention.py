"""Attention of a single query on the CPU, where torch is slow as transformers asks for it."""

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
    """Let a transformers model that attends by torch's sdpa on the CPU use `single_query_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    kinds: set[Any] = set(map(type, model.modules()))
    if any(map(_asks_for_its_name, kinds)):
        return
    AttentionInterface.register(NAME, single_query_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _asks_for_its_name(cls: Any) -> bool:
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
    that took 0.7 instead of 8 ms.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    special = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if groups == 1 or query.shape[2] != 1 or attention_mask is not None or special:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return attended
    batch, heads, _, width = query.shape
    packed = query.reshape(batch, heads // groups, groups, width)
    output = F.scaled_dot_product_attention(packed, key, value, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, 1, heads, value.shape[-1]), None
