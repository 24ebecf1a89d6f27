"""The families with linear attention that are read from GGUF: Qwen3-Next, Qwen3.5 and 3.6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_local.offload.checkpoint.gguf_description import Description, Fields
from moe_local.offload.checkpoint.gguf_family import Family, Join, Undo

MOST_LAYERS = 10_000
"""More than any model has; a config with more is refused later."""


def _linear_attention(file: Description) -> Fields:
    """Ollama's own converter says of values' heads whether their order is llama.cpp's."""
    file.require("ssm.v_head_reordered", True, "the order of values' heads is llama.cpp's")
    every, values = file.number("full_attention_interval", 4), file.number("ssm.time_step_rank")
    return {
        "moe_intermediate_size": file.number("expert_feed_forward_length"),
        "shared_expert_intermediate_size": file.number("expert_shared_feed_forward_length"),
        "num_experts": file.number("expert_count"),
        "layer_types": [
            "linear_attention" if (layer + 1) % every else "full_attention"
            for layer in range(min(file.layers(), MOST_LAYERS))
        ],
        "linear_conv_kernel_dim": file.number("ssm.conv_kernel"),
        "linear_key_head_dim": file.number("ssm.state_size"),
        "linear_num_key_heads": file.number("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": file.number("ssm.inner_size") // values,
        "rope_parameters": file.rotation(partial=True),
    }


def _qwen3_next(file: Description) -> Fields:
    """No layer of a published model has a feed-forward of its own, so its width does not matter."""
    own = {"model_type": "qwen3_next", "norm_topk_prob": True}
    if file.said("feed_forward_length"):
        own["intermediate_size"] = file.number("feed_forward_length")
    return _linear_attention(file) | own


def _less_one(norm: torch.Tensor) -> torch.Tensor:
    return norm - 1


NORMS = ("output_norm", "attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm")
"""Those that Qwen3-Next and its successors store plus one."""


def _qwen3_next_undo(_config: Any) -> Mapping[str, Undo]:
    return {
        **dict.fromkeys(NORMS, _less_one),
        "ssm_a": lambda decay: torch.log(-decay),
        "ssm_conv1d": lambda kernel: kernel.unsqueeze(1),
    }


def _qwen3_next_joins(config: Any) -> Mapping[str, Join]:
    """The first converter left queries, keys, values and gates in one matrix ("ssm_in"), by head of keys."""
    keys, width = config.linear_num_key_heads, config.linear_key_head_dim

    def by_head(qkv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        parts = qkv.split([keys * width, keys * width, len(qkv) - 2 * keys * width])
        return torch.cat([part.unflatten(0, (keys, -1)) for part in (*parts, gate)], dim=1).flatten(0, 1)

    return {"linear_attn.in_proj_qkvz.weight": Join(("attn_qkv.weight", "attn_gate.weight"), by_head)}


def _qwen3_5_moe_undo(config: Any) -> Mapping[str, Undo]:
    """Norms are stored plus one, decays as they are used. Heads of values, several of which belong to a head
    of keys, are stored so that those of one head of keys are far apart."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    before = 2 * keys * config.linear_key_head_dim

    def grouped(rows: torch.Tensor) -> torch.Tensor:
        by_key = rows.reshape(values // keys, keys, -1, *rows.shape[1:]).transpose(0, 1)
        return by_key.reshape(rows.shape)

    def last_grouped(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[:before], grouped(rows[before:])])

    return {
        **dict.fromkeys(NORMS, _less_one),
        **dict.fromkeys(("attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt"), grouped),
        "ssm_a": lambda decay: grouped(torch.log(-decay)),
        "attn_qkv": last_grouped,
        "ssm_conv1d": lambda kernel: last_grouped(kernel).unsqueeze(1),
        "ssm_out": lambda weight: grouped(weight.T).T,
    }


LINEAR = {
    "post_attention_norm": "post_attention_layernorm",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_dt": "linear_attn.dt_bias",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
QWEN3_NEXT = Family(
    "Qwen3-Next",
    _qwen3_next,
    {**LINEAR, "ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"},
    _qwen3_next_undo,
    _qwen3_next_joins,
    split="qwen2",
)
QWEN3_5_MOE = Family(
    "Qwen3.5-MoE",
    lambda file: _linear_attention(file) | {"model_type": "qwen3_5_moe_text"},
    {
        **LINEAR,
        "attn_qkv": "linear_attn.in_proj_qkv",
        "attn_gate": "linear_attn.in_proj_z",
        "ssm_alpha": "linear_attn.in_proj_a",
        "ssm_beta": "linear_attn.in_proj_b",
    },
    _qwen3_5_moe_undo,
    split="qwen35",
)
