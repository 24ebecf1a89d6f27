"""Translates a GGUF file's metadata and tensor names to those of transformers.

llama.cpp stores Mixtral as a "llama" with experts, and the rows of its rotary heads in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.config_limits import LARGEST
from moe_local.offload.checkpoint.gguf_file import GgufFile
from moe_local.offload.checkpoint.weights import Weight

Fields = dict[str, Any]

WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
EXPERTS = {"ffn_gate_exps": "gate_up_proj", "ffn_up_exps": "gate_up_proj", "ffn_down_exps": "down_proj"}
"""Each of these tensors is [E, out, in]. The model has one parameter with gate's rows, then up's."""


def _mixtral(sizes: Callable[..., Any]) -> Fields:
    return {
        "model_type": "mixtral",
        "intermediate_size": sizes("feed_forward_length"),
        "num_local_experts": sizes("expert_count"),
        "sliding_window": None,
    }


def _qwen2_moe(sizes: Callable[..., Any]) -> Fields:
    return {
        "model_type": "qwen2_moe",
        "intermediate_size": sizes("feed_forward_length"),
        "moe_intermediate_size": sizes("expert_feed_forward_length"),
        "shared_expert_intermediate_size": sizes("expert_shared_feed_forward_length"),
        "num_experts": sizes("expert_count"),
        "norm_topk_prob": False,
    }


def _qwen3_moe(sizes: Callable[..., Any]) -> Fields:
    return {
        "model_type": "qwen3_moe",
        "intermediate_size": sizes("feed_forward_length"),
        "moe_intermediate_size": sizes("expert_feed_forward_length"),
        "num_experts": sizes("expert_count"),
        "norm_topk_prob": True,
    }


ARCHITECTURES = {"llama": _mixtral, "qwen2moe": _qwen2_moe, "qwen3moe": _qwen3_moe}


def config_fields(file: GgufFile) -> Fields:
    """The fields of a config.json that corresponds to the file's metadata.

    Raises CheckpointError for an unsupported architecture, and for sizes that are missing or absurd.
    """
    metadata, path = file.metadata, file.path
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES or not metadata.get(f"{architecture}.expert_count"):
        raise CheckpointError(
            f"{path}: a GGUF file of architecture {architecture!r}, and only Mixtral, Qwen2-MoE and "
            "Qwen3-MoE are read from GGUF; use the model's safetensors"
        )

    def sizes(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if value is None:
            raise CheckpointError(f"{path} lacks {architecture}.{name} in its metadata; get another file")
        if not isinstance(value, int | float) or not 0 < value < LARGEST:
            raise CheckpointError(f"{path} says {architecture}.{name} is {value!r}; get another file")
        return value

    if metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
        raise CheckpointError(
            f"{path} scales its rotations, which is not read from GGUF; use the model's safetensors"
        )
    heads = sizes("attention.head_count")
    embedding = file.weights.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path} lacks the tensor token_embd.weight; get the file again")
    return ARCHITECTURES[architecture](sizes) | {
        "hidden_size": sizes("embedding_length"),
        "num_hidden_layers": sizes("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": sizes("attention.head_count_kv", heads),
        "head_dim": sizes("attention.key_length", sizes("embedding_length") // heads),
        "rms_norm_eps": sizes("attention.layer_norm_rms_epsilon"),
        "rope_theta": sizes("rope.freq_base", 10000.0),
        "max_position_embeddings": sizes("context_length"),
        "num_experts_per_tok": sizes("expert_used_count"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.weights,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }


def model_weights(file: GgufFile, config: Any) -> Iterator[Weight]:
    """The file's weights under the model's names, except for packed experts, which keep the file's names.

    Weights that the model does not have (rotary frequencies, for example) are left out.
    """
    llama = file.metadata.get("general.architecture") == "llama"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if llama else {}
    for key, weight in file.weights.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", key)
        if match is None:
            continue
        layer, name, kind = match.groups()
        if layer is None and name in WHOLE:
            yield replace(weight, key=f"{WHOLE[name]}.{kind}")
        elif layer is not None and name in EXPERTS:
            yield weight
        elif layer is not None and name in BLOCK:
            shape = (1, *weight.shape) if name == "ffn_gate_inp_shexp" else weight.shape
            renamed = f"model.layers.{layer}.{BLOCK[name]}.{kind}"
            yield replace(weight, key=renamed, shape=shape[-2:], heads=heads.get(name, 0))


def expert_parameter(key: str) -> tuple[str, str] | None:
    """(the model's parameter, the part of it) that the packed experts `key` are; None for other weights."""
    match = re.fullmatch(r"blk\.(\d+)\.(ffn_\w+_exps)\.weight", key)
    if match is None or match[2] not in EXPERTS:
        return None
    return f"model.layers.{match[1]}.mlp.experts.{EXPERTS[match[2]]}", f"{match[2]}.weight"


def expert_parts(parameter: str) -> list[str]:
    """The parts of an experts' parameter, in the order in which the model concatenates them."""
    return [f"{part}.weight" for part, name in EXPERTS.items() if parameter.endswith(f".experts.{name}")]
