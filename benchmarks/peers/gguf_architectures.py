"""Which tensors and metadata llama.cpp expects of each family of models, and where checkpoints have them.

A layer's experts are stacked, [E, out, in]. All matrices have one type; norms, routers and biases are
float32. Runs in the peer's environment, as gguf_file.py, which writes the files.
Sources: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md), and what the architectures of
llama.cpp expect (github.com/ggml-org/llama.cpp, src/models/ and conversion/).
"""

from __future__ import annotations

from collections.abc import Iterator

from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf_gpt_oss import GPT_OSS
from gguf_layer import (
    PROJECTIONS,
    Architecture,
    Config,
    Layer,
    attention,
    describe_attention,
    expert_count,
    feed_forward,
    norms_of,
    rope,
    rope_theta,
    router_and_experts,
    whole,
)
from gguf_nemotron_h import NEMOTRON_H
from gguf_qwen3_next import QWEN3_NEXT
from gguf_qwen35 import QWEN3_5_MOE
from gguf_tensor import FLOAT32, Array, Tensor


def tensors(config: Config, matrices: GGMLQuantizationType) -> Iterator[Tensor]:
    """All tensors, in the order of the file."""
    kind = ARCHITECTURES[config["model_type"]]
    config = kind.fields(config)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Tensor("token_embd.weight", (vocab, hidden), matrices, whole(f"{kind.embedding}.weight"))
    for index in range(config["num_hidden_layers"]):
        yield from kind.layer(config, Layer(index, matrices))
    yield Tensor("output_norm.weight", (hidden,), FLOAT32, whole(f"{kind.last_norm}.weight", kind.norm))
    yield Tensor("output.weight", (vocab, hidden), matrices, whole("lm_head.weight"))


def describe(writer: GGUFWriter, config: Config) -> None:
    """Write the metadata of the model. Raises ValueError for what llama.cpp does not compute."""
    architecture = ARCHITECTURES[config["model_type"]]
    config = architecture.fields(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    if "intermediate_size" in config:
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(expert_count(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if (theta := rope_theta(config)) is not None:
        writer.add_rope_freq_base(theta)
    scaling = rope(config)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1.0))
    elif kind != "default":
        raise ValueError(f"rotary embedding of type {kind!r} is not written as GGUF")
    architecture.describe(writer, config)


def _mixtral(config: Config, layer: Layer) -> Iterator[Tensor]:
    yield from attention(config, layer, paired=True)
    inner = config["intermediate_size"]
    yield from router_and_experts(config, layer, "block_sparse_moe", inner, "w1", "w2", "w3")
    yield from norms_of(config, layer)


def _describe_mixtral(writer: GGUFWriter, config: Config) -> None:
    describe_attention(writer, config)
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _qwen3_moe(config: Config, layer: Layer) -> Iterator[Tensor]:
    yield from attention(config, layer, norms=True)
    yield from router_and_experts(config, layer, "mlp", config["moe_intermediate_size"], *PROJECTIONS)
    yield from norms_of(config, layer)


def _describe_qwen3_moe(writer: GGUFWriter, config: Config) -> None:
    describe_attention(writer, config)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


LITE_LAYERS = 26, 27
"""By these numbers of layers, llama.cpp knows models whose queries have no latents."""


def _deepseek(config: Config, layer: Layer) -> Iterator[Tensor]:
    """DeepSeek V3 and what has its architecture, such as GLM-4.7-Flash.

    llama.cpp computes attention with the latents, and so has the matrix that makes keys and values of them
    in two parts: [heads, latent, width] for keys, [heads, width, latent] for values.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries, latent = config["q_lora_rank"], config["kv_lora_rank"]
    plain, turned, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield layer.matrix("attn_q_a", "self_attn.q_a_proj", queries, hidden)
    yield layer.exact("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight", queries)
    yield layer.matrix("attn_q_b", "self_attn.q_b_proj", heads * (plain + turned), queries)
    yield layer.matrix("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa", latent + turned, hidden)
    yield layer.exact("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight", latent)

    def keys(both: Array) -> Array:
        return both.reshape(heads, plain + value, latent)[:, :plain].swapaxes(1, 2)

    def values(both: Array) -> Array:
        return both.reshape(heads, plain + value, latent)[:, plain:]

    yield layer.matrix("attn_k_b", "self_attn.kv_b_proj", heads, latent, plain, turn=keys)
    yield layer.matrix("attn_v_b", "self_attn.kv_b_proj", heads, value, latent, turn=values)
    yield layer.matrix("attn_output", "self_attn.o_proj", hidden, heads * value)
    if layer.index < leading_dense(config):
        yield from feed_forward(layer, "", "mlp", hidden, config["intermediate_size"])
    else:
        inner = config["moe_intermediate_size"]
        yield from router_and_experts(config, layer, "mlp", inner, *PROJECTIONS)
        yield layer.exact("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", expert_count(config))
        shared = inner * config["n_shared_experts"]
        yield from feed_forward(layer, "_shexp", "mlp.shared_experts", hidden, shared)
    yield from norms_of(config, layer)


def _describe_deepseek(writer: GGUFWriter, config: Config) -> None:
    """llama.cpp's heads of attention are as wide as the latents, and all share one of keys and values; their
    widths in the model ("mla") are written beside."""
    if not config.get("rope_interleave", True) or config.get("attention_bias") or not config["q_lora_rank"]:
        raise ValueError(
            "latent attention is written as GGUF only if it rotates pairs, has q_lora_rank, and no biases"
        )
    if config["num_hidden_layers"] in LITE_LAYERS:
        raise ValueError("llama.cpp takes models of 26 or 27 layers for DeepSeek-V2-Lite; use another number")
    latent, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_key_length(latent + turned)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turned)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_rope_dimension_count(turned)
    if "mscale_all_dim" in rope(config):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope(config)["mscale_all_dim"])
    writer.add_leading_dense_block_count(leading_dense(config))
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])


def leading_dense(config: Config) -> int:
    """The number of first layers without experts. Raises ValueError if a later one has none either."""
    layers = int(config["num_hidden_layers"])
    types = config.get("mlp_layer_types")
    if types is None:
        return min(int(config["first_k_dense_replace"]), layers)
    count: int = types.index("sparse") if "sparse" in types else layers
    if types[count:] != ["sparse"] * (layers - count):
        raise ValueError("llama.cpp has layers without experts only before those with experts")
    return count


ARCHITECTURES = {
    "mixtral": Architecture("llama", _mixtral, _describe_mixtral),
    "qwen3_moe": Architecture("qwen3moe", _qwen3_moe, _describe_qwen3_moe),
    "deepseek_v3": Architecture("deepseek2", _deepseek, _describe_deepseek),
    "glm4_moe_lite": Architecture("deepseek2", _deepseek, _describe_deepseek),
    "gpt_oss": GPT_OSS,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "qwen3_next": QWEN3_NEXT,
    "nemotron_h": NEMOTRON_H,
}
"""By the model type of transformers."""
