"""The families of models that are read from GGUF; `gguf_family` says what each one consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.gguf_description import Description, Fields
from moe_local.offload.checkpoint.gguf_family import SIGMOID, SOFTMAX, Family, Join, Undo
from moe_local.offload.checkpoint.gguf_linear_attention import QWEN3_5_MOE, QWEN3_NEXT


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


def _gemma4(file: Description) -> Fields:
    """Sliding layers have heads of their own width and number. The file does not say that a quarter of other
    layers' heads turns, nor which tokens end a turn (106) and a call of a tool (50); all published models are
    alike in that."""
    sliding = file.said("attention.sliding_window_pattern")
    layers = file.layers()
    if not isinstance(sliding, tuple) or len(sliding) != layers or set(sliding) != {True, False}:
        raise file.senseless("attention.sliding_window_pattern")
    heads = file.said("attention.head_count_kv")
    heads = heads if isinstance(heads, tuple) else (file.key_value_heads(),) * layers
    if len(heads) != layers:
        raise file.senseless("attention.head_count_kv")
    file.require("attention.shared_kv_layers", 0, "no layer reads another's keys and values")
    whole = sliding.index(False)
    turned = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    return {
        "model_type": "gemma4_text",
        "eos_token_id": [1, 106, 50],
        "enable_moe_block": True,
        "intermediate_size": file.number("feed_forward_length"),
        "moe_intermediate_size": file.number("expert_feed_forward_length"),
        "num_experts": file.number("expert_count"),
        "top_k_experts": file.number("expert_used_count"),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "sliding_window": file.number("attention.sliding_window"),
        "head_dim": file.number("attention.key_length_swa"),
        "global_head_dim": file.number("attention.key_length"),
        "num_key_value_heads": heads[sliding.index(True)],
        "num_global_key_value_heads": heads[whole],
        "attention_k_eq_v": not file.has(f"{whole}.attn_v.weight"),
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": file.count("embedding_length_per_layer_input"),
        "final_logit_softcapping": file.said("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": turned | {"rope_theta": file.number("rope.freq_base")},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": file.number("rope.freq_base_swa", 10000.0),
            },
        },
    }


GEMMA4 = Family(
    "Gemma 4",
    _gemma4,
    {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm": "post_feedforward_layernorm",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "ffn_gate_inp": "router.proj",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_down_exps.scale": "router.per_expert_scale",
        "layer_output_scale.weight": "layer_scalar",
    },
)


def _deepseek(file: Description) -> Fields:
    """DeepSeek V3 and what has its architecture, such as GLM-4.7-Flash, or DeepSeek V2, by the router: V3's
    takes the sigmoid of scores, which not all files say, and corrects them.

    Before April 2025, the converter left keys and values in one matrix and wrote their own widths; since
    then, it also writes those of the latents, which attention can be computed with. Ollama's own converter
    of GLM-4.7-Flash ("glm4moelite") called the two the other way round, and said nothing of groups.
    """
    turned = file.number("rope.dimension_count")
    ollama = file.architecture == "glm4moelite"
    own = "" if ollama or file.said("attention.key_length_mla") is None else "_mla"
    groups = 1 if ollama else None
    fields = {
        "intermediate_size": file.number("feed_forward_length"),
        "moe_intermediate_size": file.number("expert_feed_forward_length"),
        "num_key_value_heads": file.number("attention.head_count"),
        "head_dim": turned,
        "q_lora_rank": file.number("attention.q_lora_rank") if file.said("attention.q_lora_rank") else None,
        "kv_lora_rank": file.number("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": file.number(f"attention.key_length{own}") - turned,
        "v_head_dim": file.number(f"attention.value_length{own}"),
        "n_routed_experts": file.number("expert_count"),
        "n_shared_experts": file.number("expert_shared_count"),
        "n_group": file.number("expert_group_count", groups),
        "topk_group": file.number("expert_group_used_count", groups),
        "first_k_dense_replace": file.count("leading_dense_block_count"),
        "norm_topk_prob": bool(file.said("expert_weights_norm")),
        "routed_scaling_factor": file.number("expert_weights_scale", 1.0),
    }
    if file.said("rope.scaling.type") == "yarn":
        mscale = 10 * file.number("rope.scaling.yarn_log_multiplier")  # all published models have them equal
        fields["rope_parameters"] = file.yarn() | {"mscale": mscale, "mscale_all_dim": mscale}
    else:
        fields["rope_parameters"] = file.rotation()
    corrected = file.has("exp_probs_b.bias")
    if file.said("expert_gating_func") in ((SIGMOID, None) if corrected else (SIGMOID,)):
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
    "glm4moelite": replace(DEEPSEEK, split="glm4"),
    "gemma4": GEMMA4,
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
