"""What differs between the families of models that are read from GGUF: configs, names, converted numbers.

Names, metadata and conversions are those of llama.cpp's converter (conversion/ in its repository).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.gguf_description import Description, Fields

Undo = Callable[[torch.Tensor], torch.Tensor]
"""Undoes what the converter did to a weight. May return a view, and works on the meta device, too."""

SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers for what routers do with their scores."""


class Join(NamedTuple):
    """One weight of the model that the converter took apart."""

    parts: tuple[str, ...]
    """Names of a layer's tensors."""
    join: Callable[..., torch.Tensor]
    """Puts them together; works on the meta device, too."""


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture of GGUF becomes a model of transformers."""

    name: str
    """For users."""
    fields: Callable[[Description], Fields]
    """The fields of its config.json that differ from or are not among the ones that all families share."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of a layer's tensors, those that other families do not have or call otherwise: with their ending
    ("ssm_dt.bias") -> the model's parameter, or without ("ffn_norm") -> its module."""
    undo: Callable[[Any], Mapping[str, Undo]] = lambda _: {}
    """From the model's config, for tensors whose numbers were converted: name without ending -> Undo."""
    joins: Callable[[Any], Mapping[str, Join]] = lambda _: {}
    """From the model's config, for weights that the converter took apart: the model's parameter -> Join."""
    split: str = ""
    """How text is split before tokens are merged, for files that do not say it; see `gguf_tokenizer`."""


def _mixtral(file: Description) -> Fields:
    return {
        "model_type": "mixtral",
        "intermediate_size": file.number("feed_forward_length"),
        "num_local_experts": file.number("expert_count"),
        "sliding_window": None,
        "rope_parameters": file.rotation(),
    }


def _mixtral_undo(config: Any) -> Mapping[str, Undo]:
    """RoPE pairs numbers 2i and 2i + 1 of a head in llama.cpp, i and i + width / 2 in transformers."""

    def in_halves(heads: int) -> Undo:
        return lambda weight: (
            weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        )

    return {"attn_q": in_halves(config.num_attention_heads), "attn_k": in_halves(config.num_key_value_heads)}


def _qwen2_moe(file: Description) -> Fields:
    return {
        "model_type": "qwen2_moe",
        "intermediate_size": file.number("feed_forward_length"),
        "moe_intermediate_size": file.number("expert_feed_forward_length"),
        "shared_expert_intermediate_size": file.number("expert_shared_feed_forward_length"),
        "num_experts": file.number("expert_count"),
        "norm_topk_prob": False,
        "rope_parameters": file.rotation(),
    }


def _qwen3_moe(file: Description) -> Fields:
    return {
        "model_type": "qwen3_moe",
        "intermediate_size": file.number("feed_forward_length"),
        "moe_intermediate_size": file.number("expert_feed_forward_length"),
        "num_experts": file.number("expert_count"),
        "norm_topk_prob": True,
        "rope_parameters": file.rotation(),
    }


def _gpt_oss(file: Description) -> Fields:
    """Ollama's own converter ("gptoss") writes the scaling without its type. All published models have it."""
    scaled = file.said("rope.scaling.factor") is not None
    return {
        "model_type": "gpt_oss",
        "intermediate_size": file.number("expert_feed_forward_length", file.said("feed_forward_length")),
        "num_local_experts": file.number("expert_count"),
        "sliding_window": file.number("attention.sliding_window"),
        "rope_parameters": file.yarn() | {"truncate": False} if scaled else file.rotation(),
    }


GPT_OSS = Family(
    "gpt-oss",
    _gpt_oss,
    {
        "post_attention_norm": "post_attention_layernorm",
        "attn_out": "self_attn.o_proj",
        "attn_sinks.weight": "self_attn.sinks",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
    split="gpt-4o",
)


def _minimax_m2(file: Description) -> Fields:
    file.require("expert_gating_func", SIGMOID, "sigmoid")
    return {
        "model_type": "minimax_m2",
        "intermediate_size": file.number("expert_feed_forward_length", file.said("feed_forward_length")),
        "num_local_experts": file.number("expert_count"),
        "rope_parameters": file.rotation(partial=True),
    }


def _glm4_moe(file: Description) -> Fields:
    file.require("expert_gating_func", SIGMOID, "sigmoid")
    return {
        "model_type": "glm4_moe",
        "intermediate_size": file.number("feed_forward_length"),
        "moe_intermediate_size": file.number("expert_feed_forward_length"),
        "n_routed_experts": file.number("expert_count"),
        "n_shared_experts": file.number("expert_shared_count"),
        "n_group": file.number("expert_group_count", 1),
        "topk_group": file.number("expert_group_used_count", 1),
        "first_k_dense_replace": file.count("leading_dense_block_count"),
        "norm_topk_prob": bool(file.said("expert_weights_norm")),
        "routed_scaling_factor": file.number("expert_weights_scale", 1.0),
        "attention_bias": file.has("attn_q.bias"),
        "use_qk_norm": file.has("attn_q_norm.weight"),
        "rope_parameters": file.rotation(partial=True),
    }


def _deepseek(file: Description) -> Fields:
    """DeepSeek V3 and what has its architecture, such as GLM-4.7-Flash, or DeepSeek V2, by the router.

    Before April 2025, the converter left keys and values in one matrix and wrote their own widths; since
    then, it also writes those of the latents, which attention can be computed with.
    """
    turned = file.number("rope.dimension_count")
    key = file.number("attention.key_length_mla", file.said("attention.key_length"))
    fields = {
        "intermediate_size": file.number("feed_forward_length"),
        "moe_intermediate_size": file.number("expert_feed_forward_length"),
        "num_key_value_heads": file.number("attention.head_count"),
        "head_dim": turned,
        "q_lora_rank": file.number("attention.q_lora_rank") if file.said("attention.q_lora_rank") else None,
        "kv_lora_rank": file.number("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": file.number("attention.value_length_mla", file.said("attention.value_length")),
        "n_routed_experts": file.number("expert_count"),
        "n_shared_experts": file.number("expert_shared_count"),
        "n_group": file.number("expert_group_count"),
        "topk_group": file.number("expert_group_used_count"),
        "first_k_dense_replace": file.count("leading_dense_block_count"),
        "norm_topk_prob": bool(file.said("expert_weights_norm")),
        "routed_scaling_factor": file.number("expert_weights_scale", 1.0),
    }
    if file.said("rope.scaling.type") == "yarn":
        mscale = 10 * file.number("rope.scaling.yarn_log_multiplier")  # all published models have them equal
        fields["rope_parameters"] = file.yarn() | {"mscale": mscale, "mscale_all_dim": mscale}
    else:
        fields["rope_parameters"] = file.rotation()
    if file.said("expert_gating_func") == SIGMOID:
        return fields | {"model_type": "deepseek_v3"}
    file.require("expert_gating_func", SOFTMAX, "softmax")
    file.require("expert_weights_norm", False, "weights that are not normalized")
    method = "greedy" if fields["n_group"] == 1 else "group_limited_greedy"
    return fields | {"model_type": "deepseek_v2", "topk_method": method}


def _deepseek_joins(_config: Any) -> Mapping[str, Join]:
    def keys_and_values(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[heads, latent, width] and [heads, width, latent] -> [heads x both widths, latent]."""
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)

    parts = "attn_k_b.weight", "attn_v_b.weight"
    return {"self_attn.kv_b_proj.weight": Join(parts, keys_and_values)}


def _linear_attention(file: Description) -> Fields:
    """Ollama's own converter says of values' heads whether their order is llama.cpp's."""
    file.require("ssm.v_head_reordered", True, "the order of values' heads is llama.cpp's")
    every, values = file.number("full_attention_interval", 4), file.number("ssm.time_step_rank")
    return {
        "moe_intermediate_size": file.number("expert_feed_forward_length"),
        "shared_expert_intermediate_size": file.number("expert_shared_feed_forward_length"),
        "num_experts": file.number("expert_count"),
        "layer_types": [
            "linear_attention" if (layer + 1) % every else "full_attention" for layer in range(file.layers())
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
SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
DEEPSEEK = Family(
    "DeepSeek V2 and V3",
    _deepseek,
    {
        **SHARED_EXPERTS,
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
    },
    joins=_deepseek_joins,
    split="deepseek-v3",
)

FAMILIES: dict[str, Family] = {
    "llama": Family("Mixtral", _mixtral, undo=_mixtral_undo),
    "qwen2moe": Family("Qwen2-MoE", _qwen2_moe, split="qwen2"),
    "qwen3moe": Family("Qwen3-MoE", _qwen3_moe, split="qwen2"),
    "qwen3next": QWEN3_NEXT,
    "qwen35moe": QWEN3_5_MOE,
    "deepseek2": DEEPSEEK,
    "gpt-oss": GPT_OSS,
    "gptoss": GPT_OSS,
    "glm4moe": Family(
        "GLM-4.5",
        _glm4_moe,
        {**SHARED_EXPERTS, "post_attention_norm": "post_attention_layernorm"},
        split="glm4",
    ),
    "minimax-m2": Family(
        "MiniMax M2",
        _minimax_m2,
        {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
        split="minimax-m2",
    ),
}
"""By the architecture that a file states."""


def family_of(path: Path, metadata: Mapping[str, Any]) -> Family:
    """The family of the file `path` with this metadata. Raises CheckpointError for one that is not read."""
    architecture = metadata.get("general.architecture")
    family = FAMILIES.get(str(architecture))
    if family is None or not metadata.get(f"{architecture}.expert_count"):
        names = list(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise CheckpointError(
            f"{path}: a GGUF file of architecture {architecture!r}, and only {', '.join(names[:-1])} and "
            f"{names[-1]} are read from GGUF; use the model's safetensors"
        )
    return family
