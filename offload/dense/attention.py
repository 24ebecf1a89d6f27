"""Calls torch's sdpa in faster or smaller ways where transformers' own calls are slow or need much memory."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_local.offload.dense.prompt_attention import prompt_attention
from moe_local.offload.dense.query_blocks import query_blocks
from moe_local.offload.dense.split_attention import attend_in_parts, parts_of
from moe_local.offload.modeling.class_source import class_source
from moe_local.offload.modeling.masks import single_query_mask

NAME = "sdpa_single_query"
"""The name under which `single_query_attention` is registered with transformers."""


def use_single_query_attention(model: Any) -> None:
    """Let a transformers model that attends by torch's sdpa use `single_query_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if model.device.type not in ("cpu", "cuda") or model.config._attn_implementation != "sdpa":
        return
    kinds: set[Any] = set(map(type, model.modules()))
    if any(map(asks_for_its_name, kinds)):
        return
    AttentionInterface.register(NAME, single_query_attention)
    AttentionMaskInterface.register(NAME, single_query_mask)
    model.set_attn_implementation(NAME)


def leave_cudnn_out() -> None:
    """Let torch's sdpa use torch's own kernels only, in the whole process.

    On compute capability 9 and 10 it would prefer cuDNN's (check_prefer_cudnn_attention in torch's
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). That makes a plan for every new shape, so for every
    token of an answer, as its keys become more; and `_shares_keys` and `attend_in_parts` expect the others.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def asks_for_its_name(cls: Any) -> bool:
    """Whether the class's code depends on the name of its attention implementation.

    The sparse attention of DeepSeek V3.2 and similar models masks the tokens that the indexer left out only
    for "eager" and "sdpa"; it expects an attention of any other name to do so itself.
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
    """The same as transformers' sdpa_attention_forward: query [B, H, T, D], key and value [B, H / G, S, D].

    Returns [B, T, H, D].

    One query with G heads per key head is given to torch as G queries of one head: the kernel then reads each
    key once, and multiplies matrices instead of vectors. With 32 query heads, 8 key heads and 1024 positions
    in bf16 that took 0.7 instead of 8 ms on a CPU. Where there is a mask, transformers 5.17 (not later
    releases) would copy the keys for every head.

    Many queries are the library's on a CPU: see prompt_attention. Those that it does not take go in blocks
    there if they have a mask, see query_blocks; and values that are narrower than keys (those of MLA) are
    padded: torch's kernel takes equal widths only, and otherwise all scores are kept, and multiplied at half
    the speed.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    special = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    plain = not special and dropout == 0 and groups == query.shape[1] // key.shape[1]
    if plain and query.is_cpu and query.shape[2] > 1:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        answer = prompt_attention(query, key, value, attention_mask, scaling, causal=causal)
        if answer is not None:
            return answer, None
    width, missing = value.shape[-1], key.shape[-1] - value.shape[-1]
    if missing > 0 and query.shape[2] > 1 and not query.is_cuda:
        padded = F.pad(value, (0, missing))
        answer, _ = single_query_attention(
            module, query, key, padded, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return answer[..., :width], None
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if not special and one_mask:
        shares = attention_mask is None and _shares_keys(query, key, value)
        if query.shape[2] == 1 and (groups > 1 or query.is_cuda) and not shares:
            return _packed(query, key, value, attention_mask, dropout, scaling), None
        if groups > 1 and attention_mask is None and not shares:
            module = _Ungrouped(module)
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        blocks = query_blocks(query, key, attention_mask)
        if attention_mask is not None and len(blocks) > 1:
            if groups > 1:
                module = _Ungrouped(module)
                key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            each = [
                sdpa_attention_forward(
                    module,
                    query[:, :, rows],
                    key[:, :, seen],
                    value[:, :, seen],
                    attention_mask[:, :, rows, seen],
                    dropout=dropout,
                    scaling=scaling,
                    **options,
                )[0]
                for rows, seen in blocks
            ]
            return torch.cat(each, dim=1), None
    attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return attended


def _shares_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch has a suitable kernel for heads that share keys, where there is no mask.

    On a GPU that is flash attention, which exists neither for fp32 nor before compute capability 8.0; other
    kernels would materialize the scores of all heads. The CPU's kernel is slow for one query.
    """
    if not query.is_cuda:
        return query.shape[2] > 1
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, query.shape[2] > 1, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """Attention of one query [B, H, 1, D] with a mask that is the same for all heads -> [B, 1, H, D].

    Long rows of keys are cut into parts: see split_attention.
    """
    batch, heads, _, width = query.shape
    packed = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    parts = parts_of(packed, key, value)
    if parts > 1 and dropout == 0:
        output = attend_in_parts(packed, key, value, mask, scale, parts)
        return output.to(value.dtype).reshape(batch, 1, heads, value.shape[-1])
    output = F.scaled_dot_product_attention(
        packed, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    return output.reshape(batch, 1, heads, value.shape[-1])


class _Ungrouped(nn.Module):
    """Passed in place of an attention module whose keys have already been repeated for every head."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.is_causal = getattr(module, "is_causal", True)
