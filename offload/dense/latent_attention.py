"""Attention over compressed keys and values (MLA) without expanding them for every head, for few queries.

transformers keeps one latent vector per token and at each step expands all of them to the keys and values of
all heads: for a token of DeepSeek-V3 after 4000 others that is 134 GFLOP a layer, 1.2 s on two cores. If the
same matrices are applied to the query and to the output instead ("absorbed"; DeepSeek-V2, arXiv 2405.04434,
section 2.1.2), they are applied once, not to every earlier token: 19 ms.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_local.offload.dense.attention import NAME as SINGLE_QUERY
from moe_local.offload.dense.attention import single_query_attention
from moe_local.offload.dense.linear import NativeLinear, QuantizedLinear
from moe_local.offload.dense.logits_trial import difference
from moe_local.offload.modeling.masks import single_query_mask
from moe_local.offload.modeling.stand_in import set_class, stand_in

NAME = "sdpa_latent"
"""The name under which `latent_attention` is registered with transformers."""

FROM = 256
"""Cached tokens from which on a quantized matrix is dequantized to avoid expanding their latents; to expand
fewer takes less time than to dequantize."""

logger = logging.getLogger(__name__)


def use_latent_attention(model: Any) -> None:
    """Let a transformers model's latent attention compute few tokens at a time without expanding the latents.

    For modules that expand them as DeepSeek-V3's does, in a model that attends by `single_query_attention` or
    by torch's sdpa. A trial finds out whether the logits stay the same: see `difference`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    modules = [module for module in model.modules() if _is_latent(module)]
    before = model.config._attn_implementation
    if not modules or before not in (SINGLE_QUERY, "sdpa"):
        return
    AttentionInterface.register(NAME, latent_attention)
    AttentionMaskInterface.register(NAME, single_query_mask)
    classes: list[Any] = [type(module) for module in modules]

    def change() -> None:
        model.set_attn_implementation(NAME)
        for module, cls in zip(modules, classes, strict=True):
            set_class(module, latent(cls))
            # In the trial the prompt is expanded and the token after it is not, so both must share a cache.
            module.few, module.decodes_from = 1, 0

    reason = difference(model, change)
    for module in modules:
        module.few, module.decodes_from = _few(module), FROM
    if reason is not None:
        model.set_attn_implementation(before)
        for module, cls in zip(modules, classes, strict=True):
            set_class(module, cls)
        logger.info("keys and values of all heads are made for every token: %s", reason)


def _is_latent(module: Any) -> bool:
    sizes = (getattr(module, name, None) for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"))
    return hasattr(module, "expand_kv") and all(isinstance(size, int) for size in sizes)


@cache
def latent(cls: Any) -> Any:
    """A subclass of an attention class that passes few tokens' latents unexpanded to `latent_attention`."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._absorbs = (
            hidden_states.shape[1] <= self.few
            and not torch.is_grad_enabled()
            and self.config._attn_implementation == NAME
            and _is_known(self.kv_b_proj)
        )
        try:
            return cls.forward(self, hidden_states, *args, **kwargs)
        finally:
            self._absorbs = False

    def expand_kv(self: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decodes = not self.kv_b_proj.weight.is_floating_point()
        if not getattr(self, "_absorbs", False) or (decodes and kv_nope.shape[2] < self.decodes_from):
            self._absorbs = False
            expanded: tuple[torch.Tensor, torch.Tensor] = cls.expand_kv(self, kv_nope, k_rot)
            return expanded
        return k_rot, kv_nope

    return stand_in(cls, latent, forward, expand_kv=expand_kv)


def latent_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    indices: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`single_query_attention`, except for a module that passes its latents unexpanded.

    Such a module passes query [B, H, T, N + R] (per head, N numbers without rotary positions and R with), as
    key the rotary parts of all tokens' keys, [B, 1, S, R], and as value their latents, [B, 1, S, L]. With the
    module's matrices k [H, N, L] and v [H, V, L] the scores are (query k) . latent plus the product of the
    rotary parts, and the output is v times the weighted sum of the latents, [B, T, H, V]. Scores and sums are
    in fp32.

    `indices` [B, T, I]: the tokens that each query sees, where the module chooses them (DeepSeek-V3.2). Such
    a module puts them into the mask only for attention implementations of transformers' own names.
    """
    if indices is not None:
        if attention_mask is None:
            raise ValueError("tokens were chosen, and there is no mask to leave the others out of")
        attention_mask = _chosen(attention_mask, indices)
    if not getattr(module, "_absorbs", False):
        return single_query_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    (batch, heads, queries, width), plain = query.shape, module.qk_nope_head_dim
    matrix = _matrix(module.kv_b_proj, query.dtype).view(heads, -1, module.kv_lora_rank)
    into = _by_head(query[..., :plain], matrix[:, :plain])
    positions, latents = _factor(key[:, 0]), _factor(value[:, 0])
    scores = _products(into.flatten(1, 2), latents.transpose(1, 2))
    scores += _products(query[..., plain:].flatten(1, 2), positions.transpose(1, 2))
    scores *= width**-0.5 if scaling is None else scaling
    scores = scores.view(batch, heads, queries, -1)
    if attention_mask is None and queries > 1:
        attention_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)  # padding may see nothing at all
    elif attention_mask is not None:
        scores += attention_mask
    answer = _products(scores.softmax(dim=-1).flatten(1, 2), latents)
    answer = answer.view(batch, heads, queries, -1).to(matrix.dtype)
    return _by_head(answer, matrix[:, plain:].transpose(1, 2)).transpose(1, 2).contiguous(), None


def _factor(y: torch.Tensor) -> torch.Tensor:
    """`y` as `_products` multiplies with it: as it is on a GPU, in fp32 elsewhere."""
    return y if y.is_cuda else y.float()


def _products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [B, M, K] times y [B, K, N], read in y's dtype, accumulated and returned in fp32."""
    if y.dtype == torch.float32:
        return x.float() @ y
    return torch.bmm(x.to(y.dtype), y, out_dtype=torch.float32)  # without a copy of y


def _by_head(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, in] times [H, in, out], each head by its own matrix -> [B, H, T, out]."""
    batch, heads, tokens, _ = x.shape
    rows = x.transpose(0, 1).reshape(heads, batch * tokens, -1)
    return torch.bmm(rows, matrices).view(heads, batch, tokens, -1).transpose(0, 1)


def _few(module: Any) -> int:
    """Most queries for which scores over latents, which are longer than keys, cost less than expanding them.

    A quarter of the number at which both take as many multiplications, since these scores are in fp32.
    """
    latent, head = module.kv_lora_rank, module.qk_nope_head_dim + module.v_head_dim
    even: int = latent * head // max(1, 2 * latent - head)
    return max(1, even // 4)


def _chosen(mask: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A mask [B, 1, T, S], boolean or added to scores, that also hides all tokens that were not chosen."""
    left_out = torch.ones_like(mask, dtype=torch.bool).scatter(-1, indices[:, None].long(), False)
    if mask.dtype == torch.bool:
        return mask & ~left_out
    return mask.masked_fill(left_out, torch.finfo(mask.dtype).min)


def _is_known(linear: Any) -> bool:
    """Whether `_matrix` can read a linear layer's weight, and the layer computes nothing else: it has neither
    a bias nor hooks, and nobody has replaced its forward, as LoRA's subclasses do. Accelerate's hooks, which
    replace it, too, only move tensors."""
    known = isinstance(linear, QuantizedLinear)
    if not known and isinstance(linear, nn.Linear):
        plain = type(linear) in (nn.Linear, NativeLinear) and linear.weight.is_floating_point()
        known = plain or getattr(linear.weight, "quant_state", None) is not None
    replaced = "forward" in vars(linear) and not hasattr(linear, "_hf_hook")
    return (
        known
        and not replaced
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )


def _matrix(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a linear layer, [out, in]; dequantized at each call if it is quantized."""
    if isinstance(linear, QuantizedLinear):
        return linear.decoded(dtype)
    state = getattr(linear.weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        values: torch.Tensor = dequantize_4bit(linear.weight.data, state)
        return values.to(dtype)
    weight: torch.Tensor = linear.weight
    return weight
