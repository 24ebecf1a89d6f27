"""Tiny seeded checkpoints in the Hub's layout, which are fast to make and whose routing varies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

VOCAB = 320
PAD, BOS, EOS = 0, 1, 2

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}

_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_INDEXER: dict[str, Any] = {"index_n_heads": 8, "index_head_dim": 32, "index_topk": 16}
"""Many heads, since with few the scores after the ReLU are often equal, and then chance decides."""
_LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}
_SHARED: dict[str, Any] = {
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "sliding_window": None},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "qwen2_moe": _SHARED,
    "qwen3_next": {**_SHARED, **_LINEAR},
    "qwen3_5_moe": {**_SHARED, **_LINEAR},
    "olmoe": {"num_experts": 8},
    "granitemoe": {"num_local_experts": 8},
    "phimoe": {"num_local_experts": 8},
    "gpt_oss": {
        "num_local_experts": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "deepseek_v2": {**_MLA, **_DEEPSEEK, "head_dim": 16, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_MLA, **_DEEPSEEK},
    "deepseek_v32": {**_MLA, **_DEEPSEEK, **_INDEXER},
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "n_routed_experts": 8,
        "moe_intermediate_size": 64,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "sliding_window": 16,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        **_INDEXER,
    },
    "glm4_moe": {**_DEEPSEEK, "partial_rotary_factor": 0.5},
    "glm4_moe_lite": {**_MLA, **_DEEPSEEK},
    "glm_moe_dsa": {**_MLA, **_DEEPSEEK, **_INDEXER},
    "minimax_m2": {"num_local_experts": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "jamba": {
        "num_experts": 8,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "llama4": {
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
    },
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 0,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "switch_transformers": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 4,
        "num_experts": 8,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "expert_capacity": 3,
        "decoder_start_token_id": PAD,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "afmoe": {
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "num_dense_layers": 1,
        "sliding_window": 16,
        "num_shared_experts": 1,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "granitemoehybrid": {
        "num_local_experts": 8,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "shared_intermediate_size": 64,
    },
    "qwen3_vl_moe": {"num_experts": 8, "moe_intermediate_size": 64},
    "nemotron_h": {
        **_DEEPSEEK,
        "n_group": 1,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 64,
    },
    "mistral4": {**_MLA, **_DEEPSEEK, "n_group": 1, "head_dim": 32},
    "kimi_linear": {
        **_MLA,
        **_DELTA,
        "moe_intermediate_size": 64,
        "num_local_experts": 8,
        "q_lora_rank": None,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "bailing_hybrid": {
        **_MLA,
        **_DEEPSEEK,
        "num_experts": 8,
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "num_mtp_layers": 0,
    },
    "glm5_next": {
        **_MLA,
        **_DELTA,
        **_DEEPSEEK,
        **_INDEXER,
        "n_group": 1,
        "index_kpool": 4,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "minimax_m3_vl": {
        "num_local_experts": 8,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 64,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "step3p7": {
        "num_local_experts": 8,
        "moe_intermediate_size": 64,
        "share_expert_dim": 64,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "hy_v3": {"num_experts": 8, "moe_intermediate_size": 64, "first_k_dense_replace": 1},
    "dots1": {**_DEEPSEEK, "n_group": 1},
    "exaone_moe": {"num_experts": 8, "moe_intermediate_size": 64, "sliding_window": 16},
    "cohere2_moe": {"num_experts": 8, "sliding_window": 16},
    "mimo_v2_flash": {"n_routed_experts": 8, "moe_intermediate_size": 64, "sliding_window": 16},
    "solar_open": {"n_routed_experts": 8, "moe_intermediate_size": 64},
    "llama": {},
}
"""Fields by transformers' model type, which add to or override those of _BASE; `llama` is a dense model."""

_VISION: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
    "qwen3_vl_moe": {
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "llama4": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    "glm5_next": {"depth": 1, "num_heads": 2, "out_hidden_size": 64},
    "minimax_m3_vl": {"num_hidden_layers": 1, "num_attention_heads": 2},
    "step3p7": {"num_hidden_layers": 1, "num_attention_heads": 2},
    "gemma4": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
    },
}
"""Configs of vision towers by model type; for these types, CONFIGS has the fields of the text model."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A transformers config of the tiny model."""
    from transformers import AutoConfig

    fields = {**_BASE, **CONFIGS[model_type], **overrides}
    if model_type == "switch_transformers":  # which has other names for the same sizes
        fields = {name: value for name, value in fields.items() if name not in _BASE or name in _ITS_OWN}
    if model_type not in _VISION:
        return AutoConfig.for_model(model_type, **fields)
    vision = {"hidden_size": 32, "intermediate_size": 32, **_VISION[model_type]}
    parts = {"text_config": fields, "vision_config": vision}
    if model_type == "gemma4":
        parts["audio_config"] = None
    return AutoConfig.for_model(
        model_type, **parts, tie_word_embeddings=fields["tie_word_embeddings"], pad_token_id=PAD
    )


_ITS_OWN = {"vocab_size", "pad_token_id", "eos_token_id", "tie_word_embeddings"}


def hub_class(config: Any) -> Any:
    """The class whose layout published checkpoints have; for multimodal models, that of the whole model."""
    from transformers.models.auto import modeling_auto as auto

    mappings = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )
    return next(mapping[type(config)] for mapping in mappings if type(config) in mapping)


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A transformers model in fp32, on the CPU, in eval mode; the same weights for the same arguments.

    Matrices are scaled so that their output is about as large as their input, and three times as large for
    routers and the head, so that the choice of experts and the next token depend on the text.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hub_class(config)._from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    # Gemma scales its embeddings up, and its head has the same weights.
    embedded = 0.03 if model_type == "gemma4" else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name or name == "shared.weight":
                parameter.copy_(embedded * noise)
            elif parameter.dim() == 1:
                parameter.add_(0.05 * noise)
            else:
                gain = 3.0 if any(part in name for part in ("router", "gate.weight", "lm_head")) else 1.0
                parameter.copy_(gain / math.sqrt(parameter.shape[-1]) * noise)
        for name, table in model.named_buffers():
            if "tid2eid" in name:  # the experts of each token id, which must be distinct
                order = torch.rand(table.shape[0], 8, generator=generator).argsort(1)
                table.copy_(order[:, : table.shape[1]])
    return model


def write_checkpoint(
    folder: Path,
    model_type: str,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Save a tiny model as a Hub folder in about `shards` safetensors files; returns `folder`."""
    model = tiny_model(model_type, seed, **overrides).to(dtype)
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-nbytes // shards) if shards > 1 else "1GB")
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer(
    special: Sequence[str] = (), added: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE
) -> Any:
    """A byte-level BPE of VOCAB tokens with a chat template; `special` and `added` are among them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    usual = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len({*special, *added} - {*usual}),
        special_tokens=usual,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (
        "the expert router sends each token of the text to the experts that the model has learned to trust"
    )
    tokenizer.train_from_iterator([words] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )
