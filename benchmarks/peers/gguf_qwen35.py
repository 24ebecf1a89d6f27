"""Qwen3.5 and 3.6 MoE as GGUF: gated delta-net layers, gated attention, and a shared expert.

Runs in the peer's environment, as gguf_file.py, which writes the files; sources in gguf_architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from gguf import GGUFWriter
from gguf_layer import (
    Architecture,
    Config,
    Layer,
    attention,
    describe_attention,
    expert_count,
    feed_forward,
    head_width,
    norms_of,
    rope,
)
from gguf_tensor import Array, Read, Tensor, floats


def layer_with(
    linear_attention: Callable[[Config, Layer], Iterator[Tensor]],
) -> Callable[[Config, Layer], Iterator[Tensor]]:
    """The tensors of a layer, of which most have linear attention."""

    def layer_of(config: Config, layer: Layer) -> Iterator[Tensor]:
        if (layer.index + 1) % full_attention_interval(config):
            yield from linear_attention(config, layer)
        else:
            yield from attention(config, layer, gated=True, norms=True, norm=plus_one)
        hidden = config["hidden_size"]
        yield layer.exact("ffn_gate_inp.weight", "mlp.gate.weight", expert_count(config), hidden)
        yield from _experts(config, layer)
        yield layer.exact("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", hidden)
        shared = config["shared_expert_intermediate_size"]
        yield from feed_forward(layer, "_shexp", "mlp.shared_expert", hidden, shared)
        yield from norms_of(config, layer, second="post_attention_norm", norm=plus_one)

    return layer_of


def _experts(config: Config, layer: Layer) -> Iterator[Tensor]:
    """Published checkpoints have the experts of a layer in two tensors, [E, rows of gate and then of up,
    D] and [E, D, rows]; transformers saves every matrix by itself."""
    count, hidden, inner = expert_count(config), config["hidden_size"], config["moe_intermediate_size"]
    for name, packed, own, rows, columns in (
        ("gate", "gate_up_proj", slice(inner), inner, hidden),
        ("down", "down_proj", slice(None), hidden, inner),
        ("up", "gate_up_proj", slice(inner, None), inner, hidden),
    ):

        def matrices(read: Read, name: str = name, packed: str = packed, own: slice = own) -> Iterator[Array]:
            """Of all experts, [rows, columns] each."""
            module = layer.source("mlp.experts")
            try:
                experts = read(f"{module}.{packed}")
            except KeyError:
                return (read(f"{module}.{e}.{name}_proj.weight") for e in range(count))
            return (expert[own] for expert in experts)

        stack = f"blk.{layer.index}.ffn_{name}_exps.weight"
        yield Tensor(stack, (count, rows, columns), layer.matrices, matrices)


def _linear_attention(config: Config, layer: Layer) -> Iterator[Tensor]:
    """Several heads of values belong to a head of keys; llama.cpp has the first of each head of keys, then
    the second of each, and so on. It has decays as they are used."""
    hidden, keys, values = config["hidden_size"], config["linear_num_key_heads"], value_heads(config)
    width, kernel = config["linear_value_head_dim"], config["linear_conv_kernel_dim"]
    before = 2 * keys * config["linear_key_head_dim"]

    def spread(rows: Array) -> Array:
        by_key = rows.reshape(keys, values // keys, -1, *rows.shape[1:])
        return by_key.swapaxes(0, 1).reshape(rows.shape)

    def spread_values(rows: Array) -> Array:
        return np.concatenate([rows[:before], spread(rows[before:])])

    module, channels = "linear_attn", before + values * width
    yield layer.matrix("attn_qkv", f"{module}.in_proj_qkv", channels, hidden, turn=spread_values)
    yield layer.matrix("attn_gate", f"{module}.in_proj_z", values * width, hidden, turn=spread)
    yield layer.matrix("ssm_beta", f"{module}.in_proj_b", values, hidden, turn=spread)
    yield layer.matrix("ssm_alpha", f"{module}.in_proj_a", values, hidden, turn=spread)
    convolution = f"{module}.conv1d.weight"
    yield layer.exact(
        "ssm_conv1d.weight", convolution, channels, kernel, turn=lambda rows: spread_values(rows[:, 0])
    )
    yield layer.exact("ssm_dt.bias", f"{module}.dt_bias", values, turn=spread)
    yield layer.exact("ssm_a", f"{module}.A_log", values, turn=lambda log: spread(-np.exp(floats(log))))
    yield layer.exact("ssm_norm.weight", f"{module}.norm.weight", width)
    yield layer.matrix(
        "ssm_out", f"{module}.out_proj", hidden, values * width, turn=lambda weight: spread(weight.T).T
    )


def plus_one(norm: Array) -> Array:
    """Norms other than the delta-net's own multiply by their weight plus one."""
    return floats(norm) + 1


def value_heads(config: Config) -> int:
    return int(config["linear_num_value_heads"])


def full_attention_interval(config: Config) -> int:
    """Every how many layers one has attention. Raises ValueError if that is not the whole pattern."""
    types = config["layer_types"]
    linear = ["linear_attention"]
    interval = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
    pattern = [*linear * (interval - 1), "full_attention"] * len(types)
    if types != pattern[: len(types)]:
        raise ValueError("llama.cpp computes it only with full attention at equal intervals")
    return int(interval)


def describe_sizes(writer: GGUFWriter, config: Config) -> None:
    """Write what llama.cpp wants to know of layers with and without linear attention."""
    if config["linear_key_head_dim"] != config["linear_value_head_dim"]:
        raise ValueError("llama.cpp computes it only with heads of keys and values of the same width")
    turned = rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor", 0.25)
    describe_attention(writer, config, turned=int(head_width(config) * turned))
    writer.add_full_attention_interval(full_attention_interval(config))
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(value_heads(config))
    writer.add_ssm_inner_size(value_heads(config) * config["linear_value_head_dim"])


def _describe(writer: GGUFWriter, config: Config) -> None:
    describe_sizes(writer, config)
    sections = rope(config).get("mrope_section", [11, 11, 10])
    if sum(sections) > head_width(config):
        raise ValueError("llama.cpp computes Qwen3.5 only with heads as wide as mrope's sections together")
    writer.add_rope_dimension_sections([*sections, 0])


QWEN3_5_MOE = Architecture("qwen35moe", layer_with(_linear_attention), _describe, norm=plus_one)
