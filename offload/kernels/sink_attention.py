"""Attention whose softmax has a sink, by torch's fused kernels.

A sink is one number a head that takes part in the softmax and has no value (gpt-oss). transformers has only
its eager attention for that, which keeps every score several times over: 1024 tokens of gpt-oss behind 3072
took 1.6 GiB a layer and four times as long as here, on a CPU in bf16.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from moe_local.cache.errors import first_line
from moe_local.offload.kernels.attention import asks_for_its_name, single_query_attention

NAME = "fused_with_sinks"
"""As which transformers knows `sink_attention`."""

TOKENS = 5
"""Length of the prompt that a model is tried with."""

logger = logging.getLogger(__name__)


def use_sink_attention(model: Any) -> None:
    """Let a transformers model of eager attention with sinks use `sink_attention`, if that changes nothing.

    Which is found out by trying: runs two forwards of a few tokens, and needs experts that answer something.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.device.type not in ("cpu", "cuda") or model.config._attn_implementation != "eager":
        return
    modules = list(model.modules())
    if not any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in modules):
        return
    kinds: set[Any] = set(map(type, modules))
    if any(map(asks_for_its_name, kinds)):
        return
    AttentionInterface.register(NAME, sink_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    wanted = _logits(model)
    try:
        model.set_attn_implementation(NAME)
        off = float((_logits(model) - wanted).norm() / wanted.norm())
        reason = (
            None
            if off <= (1e-4 if model.dtype == torch.float32 else 0.03)
            else f"logits were off by {off:.2g}"
        )
    except Exception as error:  # whatever a model or a card makes of it
        reason = f"{type(error).__name__}: {first_line(error)}"
    if reason is not None:
        model.set_attn_implementation("eager")
        logger.info("attention stays eager: %s", reason)


def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(TOKENS, device=model.device)[None] + 1
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits.float()
    return logits


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
    """As transformers' attention functions: query [B, H, T, D], key and value [B, H / G, S, D], the mask bool
    [B, 1, T, S] (True: seen) or None, sinks `s_aux` [H], or None for a layer without. Not for training.

    Returns [B, T, H, D].

    With L = log sum exp of a query's scores, which the kernels give beside their answer, a sink s makes that
    answer exp(L) / (exp(L) + exp(s)) of what it was.
    """
    if s_aux is None:
        return single_query_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if queries == 1:  # G heads that share keys are as good as G queries of one head
        query = query.reshape(batch, heads // groups, groups, width)
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    causal = queries > 1 and attention_mask is None
    bias = None if attention_mask is None else _bias(attention_mask, query, key.shape[2])
    output, logsumexp = _attend(query, key, value, bias, causal, scaling)
    share = torch.sigmoid(logsumexp - s_aux.float().view(1, query.shape[1], -1))
    output = (output * share[..., None]).to(query.dtype)
    return output.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def _bias(seen: torch.Tensor, query: torch.Tensor, keys: int) -> torch.Tensor:
    """What is added to scores, [B, H, T, keys], of which heads and, where it says the same to all, queries
    share the memory: rows of it begin at multiples of 16 numbers, as CUDA's kernel asks for."""
    rows = seen.new_zeros((*seen.shape[:-1], -(-keys // 16) * 16), dtype=query.dtype)[..., :keys]
    rows.masked_fill_(~seen, torch.finfo(query.dtype).min)  # padding may see nothing at all
    return rows.expand(*query.shape[:3], keys)


def _attend(
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
