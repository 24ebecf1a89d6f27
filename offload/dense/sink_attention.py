"""Attention with sinks, by torch's fused kernels.

A sink is one number per head that takes part in the softmax and has no value (gpt-oss). transformers has only
its eager attention for that, which keeps several copies of all scores: 1024 tokens of gpt-oss after 3072 took
1.6 GiB a layer and four times as long as here, on a CPU in bf16.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from moe_local.offload.dense.attention import asks_for_its_name, single_query_attention
from moe_local.offload.dense.logits_trial import difference
from moe_local.offload.dense.prompt_attention import prompt_attention
from moe_local.offload.dense.query_blocks import query_blocks
from moe_local.offload.dense.split_attention import attend, attend_in_parts, beside_sinks, bias_of, parts_of
from moe_local.offload.modeling.class_source import class_source
from moe_local.offload.modeling.masks import eager_mask, single_query_mask

NAME = "fused_with_sinks"
"""The name under which `sink_attention` is registered with transformers."""

WITH_ADDED_MASK = "added_mask_with_sinks"
"""The name for models whose attention expects a mask of numbers that are added to scores."""

logger = logging.getLogger(__name__)


def use_sink_attention(model: Any) -> None:
    """Let a transformers model of eager attention with sinks use `sink_attention`, if the logits stay equal.

    That is found out by trial: see `difference`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if model.device.type not in ("cpu", "cuda") or model.config._attn_implementation != "eager":
        return
    modules = list(model.modules())
    if not any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in modules):
        return
    kinds: set[Any] = set(map(type, modules))
    if any(map(asks_for_its_name, kinds)):
        return
    adds = any(map(_changes_its_mask, kinds))
    name = WITH_ADDED_MASK if adds else NAME
    AttentionInterface.register(name, sink_attention)
    AttentionMaskInterface.register(name, eager_mask if adds else single_query_mask)
    reason = difference(model, lambda: model.set_attn_implementation(name))
    if reason is not None:
        model.set_attn_implementation("eager")
        logger.info("attention stays eager: %s", reason)


def _changes_its_mask(cls: Any) -> bool:
    """Whether an attention class changes its mask, which it expects to be numbers to be added to scores
    (DeepSeek-V4)."""
    return cls.__name__.endswith("Attention") and "attention_mask = " in class_source(cls)


def sink_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' interface: query [B, H, T, D], key and value [B, H / G, S, D],
    the mask [B, 1, T, S], bool (True: seen) or added to scores, or None, sinks `s_aux` [H], or None for a
    layer without. Not for training.

    Returns [B, T, H, D].
    """
    if s_aux is None:
        return single_query_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    batch, heads, queries, width = query.shape
    if attention_mask is None and queries not in (1, key.shape[2]):
        raise ValueError(f"{queries} queries of {key.shape[2]} keys have no mask")
    if torch.is_autocast_enabled(query.device.type):  # it casts for sdpa, but not for sdpa's kernels
        query = query.to(torch.get_autocast_dtype(query.device.type))
    key, value = key.to(query.dtype), value.to(query.dtype)
    groups = heads // key.shape[1]
    sinks = s_aux.float()
    if queries == 1:  # G heads that share keys are treated as G queries of one head
        query = query.reshape(batch, heads // groups, groups, width)
        parts = parts_of(query, key, value)
        output = attend_in_parts(query, key, value, attention_mask, scaling, parts, sinks.view(-1, groups))
    elif (prompt := prompt_attention(query, key, value, attention_mask, scaling, sinks=sinks)) is not None:
        return prompt, None
    else:
        if key.shape[1] == 1:
            key, value = (x.expand(-1, heads, -1, -1) for x in (key, value))
        elif groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        attended = []
        for rows, seen in query_blocks(query, key, attention_mask):
            some, keys, bias = query[:, :, rows], key[:, :, seen], None
            if attention_mask is not None:
                bias = bias_of(attention_mask[:, :, rows, seen], some, keys.shape[2])
            output, logsumexp = attend(some, keys, value[:, :, seen], bias, attention_mask is None, scaling)
            attended.append(beside_sinks(output, logsumexp, sinks[:, None]))
        output = torch.cat(attended, dim=2)
    output = output.to(query.dtype)
    return output.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None
