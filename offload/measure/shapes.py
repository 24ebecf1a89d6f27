"""The shapes of published models that can be measured with synthetic weights."""

from __future__ import annotations

from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.offload.checkpoint.registry import find_alias

PUBLISHED = (
    *("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-next-80b-a3b", "qwen3.6-35b-a3b"),
    *("glm-4.7-flash", "gpt-oss-120b", "deepseek-v3", "nemotron-3-nano-30b-a3b", "lfm2-8b-a1b"),
)

# From config.json of openai/gpt-oss-120b and deepseek-ai/DeepSeek-V3: the fields that determine the shape.
_GPT_OSS_120B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
_DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}


def published_layers(name: str) -> int:
    """How many decoder layers the whole model has. Raises OptionError for an unknown name."""
    return int(_fields(name)["num_hidden_layers"])


def config_fields(name: str, layers: int) -> dict[str, Any]:
    """Fields of the model's config.json, with its first `layers` decoder layers, true widths, and in bf16.

    The last layer of each has experts, also where the published model's first layers are dense.
    Raises OptionError for an unknown name, or more layers than the model has.
    """
    fields = _fields(name)
    most = int(fields["num_hidden_layers"])
    if not 1 <= layers <= most:
        raise OptionError(f"layers {layers} of {name} is not from 1 to {most}")
    fields["num_hidden_layers"] = layers
    for dense in {"first_k_dense_replace", "num_dense_layers"} & fields.keys():
        fields[dense] = min(fields[dense], layers - 1)
    for types in {"layer_types", "layers_block_type", "mlp_layer_types"} & fields.keys():
        kinds = fields[types]
        fields[types] = kinds[:layers] if types == "layer_types" else [*kinds[: layers - 1], kinds[-1]]
    # no eos: the demo's tokenizer has other ids, and a measurement lets none of them end an answer
    return fields | {"dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def _fields(name: str) -> dict[str, Any]:
    own = {"gpt-oss-120b": _GPT_OSS_120B, "deepseek-v3": _DEEPSEEK_V3}
    if name in own:
        return dict(own[name])
    alias = find_alias(name) if name in PUBLISHED else None
    if alias is None:
        raise OptionError(f"no shape {name!r} is known; use one of {', '.join(PUBLISHED)}")
    fields: dict[str, Any] = alias.config().get_text_config(decoder=True).to_dict()
    if "layers_block_type" in fields:
        fields["num_hidden_layers"] = len(fields["layers_block_type"])
    return {k: v for k, v in fields.items() if not k.startswith("_") and k != "transformers_version"}
