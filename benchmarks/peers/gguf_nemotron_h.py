"""Nemotron 3 as GGUF: each layer is either Mamba-2, attention without positions, or experts without gates.

Runs in the peer's environment, as gguf_file.py, which writes the files; sources in gguf_architectures.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import GGUFWriter
from gguf_layer import Architecture, Config, Layer, attention, expert_count, head_width
from gguf_tensor import Tensor, floats

NAMES = {
    "mamba": ("M", "mamba", "linear_attention"),
    "moe": ("E", "moe"),
    "attention": ("*", "attention", "full_attention"),
}
"""What configs call each kind of layer: published ones by a letter, transformers' by words, old and new."""
KINDS = {name: kind for kind, names in NAMES.items() for name in names}
BIASES = "attention_bias", "mamba_proj_bias", "mlp_bias", "use_bias"


def _kinds(config: Config) -> list[str]:
    """What each layer is. Raises ValueError for feed-forwards without experts, which llama.cpp does not have
    beside layers with experts."""
    layers = config.get("layers_block_type") or config["hybrid_override_pattern"]
    if unknown := sorted(set(layers) - set(KINDS)):
        raise ValueError(f"layers of the kind {', '.join(unknown)} are not written as GGUF")
    return [KINDS[name] for name in layers]


def _layer(config: Config, layer: Layer) -> Iterator[Tensor]:
    kind = _kinds(config)[layer.index]
    if kind == "mamba":
        yield from _mamba2(config, layer)
    elif kind == "attention":
        yield from attention(config, layer, module="mixer")
    else:
        yield from _experts(config, layer)
    yield layer.exact("attn_norm.weight", "norm.weight", config["hidden_size"])


def _mamba2(config: Config, layer: Layer) -> Iterator[Tensor]:
    """llama.cpp has decays as they are used, these and the shortcuts' weights in a column, and the norm by
    groups."""
    hidden, inner, groups = config["hidden_size"], _inner(config), config["n_groups"]
    heads, kernel = config["mamba_num_heads"], config["conv_kernel"]
    channels = inner + 2 * groups * config["ssm_state_size"]
    yield layer.matrix("ssm_in", "mixer.in_proj", inner + channels + heads, hidden)
    convolution = "mixer.conv1d"
    yield layer.exact(
        "ssm_conv1d.weight", f"{convolution}.weight", channels, kernel, turn=lambda rows: rows[:, 0]
    )
    yield layer.exact("ssm_conv1d.bias", f"{convolution}.bias", channels)
    yield layer.exact("ssm_dt.bias", "mixer.dt_bias", heads)
    yield layer.exact("ssm_a", "mixer.A_log", heads, 1, turn=lambda log: -np.exp(floats(log))[:, None])
    yield layer.exact("ssm_d", "mixer.D", heads, 1, turn=lambda weight: weight[:, None])
    grouped = groups, inner // groups
    yield layer.exact(
        "ssm_norm.weight", "mixer.norm.weight", *grouped, turn=lambda norm: norm.reshape(grouped)
    )
    yield layer.matrix("ssm_out", "mixer.out_proj", hidden, inner)


def _experts(config: Config, layer: Layer) -> Iterator[Tensor]:
    hidden, count = config["hidden_size"], expert_count(config)
    yield layer.exact("ffn_gate_inp.weight", "mixer.gate.weight", count, hidden)
    yield layer.exact("exp_probs_b.bias", "mixer.gate.e_score_correction_bias", count)
    inner, shared = config["moe_intermediate_size"], config["moe_shared_expert_intermediate_size"]
    yield layer.experts("ffn_down_exps", "mixer.experts.{}.down_proj", count, hidden, inner)
    yield layer.experts("ffn_up_exps", "mixer.experts.{}.up_proj", count, inner, hidden)
    yield layer.matrix("ffn_down_shexp", "mixer.shared_experts.down_proj", hidden, shared)
    yield layer.matrix("ffn_up_shexp", "mixer.shared_experts.up_proj", shared, hidden)


def _inner(config: Config) -> int:
    return int(config["mamba_num_heads"] * config["mamba_head_dim"])


def _fields(config: Config) -> Config:
    """Configs as published need not say how many layers there are, and have a width of feed-forwards without
    experts, of which there are none."""
    own = {key: value for key, value in config.items() if key != "intermediate_size"}
    return own | {"num_hidden_layers": len(_kinds(config)), "rms_norm_eps": config["layer_norm_epsilon"]}


def _describe(writer: GGUFWriter, config: Config) -> None:
    """llama.cpp tells layers apart by their heads of keys and the width of experts: Mamba-2 has neither."""
    if any(config.get(name) for name in BIASES) or not config.get("use_conv_bias", True):
        raise ValueError("Nemotron 3 is written as GGUF only with a bias of the convolution, and no others")
    if config.get("moe_latent_size"):
        raise ValueError(
            "Nemotron 3 is written as GGUF only with experts as wide as the model, not of latents"
        )
    if config.get("mlp_hidden_act", "relu2") != "relu2":
        raise ValueError("llama.cpp computes Nemotron 3 only with the activation relu2")
    kinds, inner = _kinds(config), config["moe_intermediate_size"]
    keys = config["num_key_value_heads"]
    writer.add_head_count_kv([keys if kind == "attention" else 0 for kind in kinds])
    writer.add_feed_forward_length([inner if kind == "moe" else 0 for kind in kinds])
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_state_size(config["ssm_state_size"])
    writer.add_ssm_group_count(config["n_groups"])
    writer.add_ssm_time_step_rank(config["mamba_num_heads"])
    writer.add_ssm_inner_size(_inner(config))


NEMOTRON_H = Architecture(
    "nemotron_h_moe",
    _layer,
    _describe,
    fields=_fields,
    prefix="backbone.",
    embedding="model.embeddings",
    last_norm="model.norm_f",
)
