"""What differs between the families of models that are read from GGUF: configs, names, converted numbers.

Names, metadata and conversions are those of llama.cpp's converter (conversion/ in its repository).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.config_limits import LARGEST
from moe_local.offload.checkpoint.gguf_file import GgufFile

Fields = dict[str, Any]
Undo = Callable[[torch.Tensor], torch.Tensor]
"""Undoes what the converter did to a weight. May return a view, and works on the meta device, too."""

SIGMOID = 2
"""llama.cpp's number for routers that take the sigmoid of their scores."""


class Description:
    """What a file says about its model: the metadata of its architecture, and which tensors it has."""

    def __init__(self, file: GgufFile) -> None:
        self.architecture = str(file.metadata.get("general.architecture"))
        self._file = file

    def said(self, name: str) -> Any:
        """The value of a field, or None."""
        return self._file.metadata.get(f"{self.architecture}.{name}")

    def number(self, name: str, default: Any = None) -> Any:
        """A field that is a number above zero, or `default`.

        Raises CheckpointError if it is missing and there is no default, and for all other values.
        """
        value = self.said(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(
                f"{self._file.path} lacks {self.architecture}.{name} in its metadata; get another file"
            )
        if not isinstance(value, int | float) or not 0 < value < LARGEST:
            raise CheckpointError(
                f"{self._file.path} says {self.architecture}.{name} is {value!r}; get another file"
            )
        return value

    def count(self, name: str) -> int:
        """A field that is a number of things, zero if it is missing."""
        return int(self.number(name)) if self.said(name) else 0

    def require(self, name: str, known: Any, meaning: str) -> None:
        """Raise CheckpointError, which says that the file has no `meaning`, if a field is there and not
        `known`."""
        value = self.said(name)
        if value is not None and value != known:
            raise CheckpointError(
                f"{self._file.path} says {self.architecture}.{name} is {value!r}, and only {known!r} "
                f"({meaning}) is read from GGUF for this family; use the model's safetensors"
            )

    def has(self, tensor: str) -> bool:
        """Whether a layer has this tensor."""
        return any(key.endswith(f".{tensor}") for key in self._file.weights)

    def layers(self) -> int:
        """The number of layers without those that predict further tokens, which come last."""
        return int(self.number("block_count")) - self.count("nextn_predict_layers")

    def head_dim(self) -> int:
        heads = self.number("attention.head_count")
        return int(self.number("attention.key_length", max(1, self.number("embedding_length") // heads)))

    def rotation(self, *, partial: bool = False) -> Fields:
        """transformers' rope_parameters without scaling. `partial`: the file says how much of a head turns.

        Raises CheckpointError if the file scales its rotations.
        """
        if (self.said("rope.scaling.type") or "none") != "none":
            raise CheckpointError(
                f"{self._file.path} scales its rotations, which is not read from GGUF for this family; "
                "use the model's safetensors"
            )
        found = {"rope_type": "default", "rope_theta": self.number("rope.freq_base", 10000.0)}
        if partial:
            found["partial_rotary_factor"] = self.number("rope.dimension_count") / self.head_dim()
        return found

    def yarn(self) -> Fields:
        """rope_parameters with YaRN's scaling."""
        return {
            "rope_type": "yarn",
            "rope_theta": self.number("rope.freq_base", 10000.0),
            "factor": self.number("rope.scaling.factor"),
            "original_max_position_embeddings": self.number("rope.scaling.original_context_length"),
            "beta_fast": self.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.number("rope.scaling.yarn_beta_slow", 1.0),
        }


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


def _qwen3_5_moe(file: Description) -> Fields:
    every, values = file.number("full_attention_interval", 4), file.number("ssm.time_step_rank")
    return {
        "model_type": "qwen3_5_moe_text",
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

    def less_one(norm: torch.Tensor) -> torch.Tensor:
        return norm - 1

    norms = ("output_norm", "attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm")
    return {
        **dict.fromkeys(norms, less_one),
        **dict.fromkeys(("attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt"), grouped),
        "ssm_a": lambda decay: grouped(torch.log(-decay)),
        "attn_qkv": last_grouped,
        "ssm_conv1d": lambda kernel: last_grouped(kernel).unsqueeze(1),
        "ssm_out": lambda weight: grouped(weight.T).T,
    }


QWEN3_5_MOE = Family(
    "Qwen3.5-MoE",
    _qwen3_5_moe,
    {
        "post_attention_norm": "post_attention_layernorm",
        "attn_qkv": "linear_attn.in_proj_qkv",
        "attn_gate": "linear_attn.in_proj_z",
        "ssm_alpha": "linear_attn.in_proj_a",
        "ssm_beta": "linear_attn.in_proj_b",
        "ssm_a": "linear_attn.A_log",
        "ssm_dt.bias": "linear_attn.dt_bias",
        "ssm_conv1d": "linear_attn.conv1d",
        "ssm_norm": "linear_attn.norm",
        "ssm_out": "linear_attn.out_proj",
    },
    _qwen3_5_moe_undo,
    split="qwen35",
)

FAMILIES: dict[str, Family] = {
    "llama": Family("Mixtral", _mixtral, undo=_mixtral_undo),
    "qwen2moe": Family("Qwen2-MoE", _qwen2_moe, split="qwen2"),
    "qwen3moe": Family("Qwen3-MoE", _qwen3_moe, split="qwen2"),
    "qwen35moe": QWEN3_5_MOE,
    "gpt-oss": GPT_OSS,
    "gptoss": GPT_OSS,
    "glm4moe": Family(
        "GLM-4.5",
        _glm4_moe,
        {
            "post_attention_norm": "post_attention_layernorm",
            "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
            "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
            "ffn_down_shexp": "mlp.shared_experts.down_proj",
        },
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
