"""Which tensors and metadata llama.cpp expects of each family of models, and where checkpoints have them.

A layer's experts are stacked, [E, out, in]. All matrices have one type; norms, routers and biases are
float32. Runs in the peer's environment, as gguf_file.py, which writes the files.
Sources: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md), and what the architectures of
llama.cpp expect (github.com/ggml-org/llama.cpp, src/models/ and conversion/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf_tensor import FLOAT32, Array, Read, Tensor

Config = dict[str, Any]
"""The fields of a model's config.json."""
Turn = Callable[[Array], Array]
"""What must be done to a checkpoint's weight: a view of it, or a reordering."""


@dataclass(frozen=True)
class Layer:
    """Makes the tensors of one decoder layer, whose names are given without the layer's prefix."""

    index: int
    matrices: GGMLQuantizationType
    """The type of its matrices."""

    def exact(self, name: str, source: str, *shape: int) -> Tensor:
        """A tensor in float32; both names end in ".weight" or ".bias"."""
        return Tensor(f"blk.{self.index}.{name}", shape, FLOAT32, whole(self.source(source)))

    def matrix(self, name: str, source: str, *shape: int, turn: Turn | None = None) -> Tensor:
        parts = whole(f"{self.source(source)}.weight", turn)
        return Tensor(f"blk.{self.index}.{name}.weight", shape, self.matrices, parts)

    def experts(self, name: str, source: str, *shape: int) -> Tensor:
        """The stack of a matrix of all experts, [E, out, in]; `source` has {} for the expert's number."""

        def parts(read: Read) -> Iterator[Array]:
            return (read(f"{self.source(source.format(e))}.weight") for e in range(shape[0]))

        return Tensor(f"blk.{self.index}.{name}.weight", shape, self.matrices, parts)

    def source(self, name: str) -> str:
        """A checkpoint's full name."""
        return f"model.layers.{self.index}.{name}"


@dataclass(frozen=True)
class Architecture:
    """A model type's architecture in llama.cpp."""

    name: str
    """llama.cpp's name."""
    layer: Callable[[Config, Layer], Iterator[Tensor]]
    """The tensors of a decoder layer; its second norm comes last."""
    describe: Callable[[GGUFWriter, Config], None]
    """Writes the metadata that not all have."""


def whole(name: str, turn: Turn | None = None) -> Callable[[Read], Iterable[Array]]:
    """A tensor's only part: the checkpoint's tensor of this name, after `turn`."""
    return lambda read: [read(name) if turn is None else turn(read(name))]


def tensors(config: Config, matrices: GGMLQuantizationType) -> Iterator[Tensor]:
    """All tensors, in the order of the file."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Tensor("token_embd.weight", (vocab, hidden), matrices, whole("model.embed_tokens.weight"))
    for index in range(config["num_hidden_layers"]):
        yield from ARCHITECTURES[config["model_type"]].layer(config, Layer(index, matrices))
    yield Tensor("output_norm.weight", (hidden,), FLOAT32, whole("model.norm.weight"))
    yield Tensor("output.weight", (vocab, hidden), matrices, whole("lm_head.weight"))


def describe(writer: GGUFWriter, config: Config) -> None:
    """Write the metadata of the model. Raises ValueError for what llama.cpp does not compute."""
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(expert_count(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_rope_freq_base(rope_theta(config))
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
    ARCHITECTURES[config["model_type"]].describe(writer, config)


def expert_count(config: Config) -> int:
    """The number of routed experts; later releases of transformers use Mixtral's name for more models."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return int(next(config[name] for name in names if name in config))


def head_width(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope(config: Config) -> Config:
    """The parameters of rotary embedding, which older configs have only if positions are scaled."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_theta(config: Config) -> float:
    """The base of rotary embedding: in configs by transformers 5 among the rope parameters, in older ones at
    the top level."""
    return float(config["rope_theta"] if "rope_theta" in config else rope(config)["rope_theta"])


def in_pairs(heads: int) -> Turn:
    """For rows of heads with rotary embedding: llama.cpp rotates rows 2i and 2i + 1 of a head together,
    transformers rows i and i + width / 2."""

    def turn(weight: Array) -> Array:
        halves = weight.reshape(heads, 2, -1, weight.shape[-1])
        return halves.swapaxes(1, 2).reshape(weight.shape)

    return turn


def _attention(
    config: Config, layer: Layer, *, paired: bool = False, norms: bool = False
) -> Iterator[Tensor]:
    """Attention with a matrix each for queries, keys and values. `norms`: queries and keys have some."""
    hidden, width = config["hidden_size"], head_width(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k = (in_pairs(heads), in_pairs(kv_heads)) if paired else (None, None)
    yield layer.matrix("attn_q", "self_attn.q_proj", heads * width, hidden, turn=q)
    yield layer.matrix("attn_k", "self_attn.k_proj", kv_heads * width, hidden, turn=k)
    yield layer.matrix("attn_v", "self_attn.v_proj", kv_heads * width, hidden)
    yield layer.matrix("attn_output", "self_attn.o_proj", hidden, heads * width)
    for name in "qk" if norms else "":
        yield layer.exact(f"attn_{name}_norm.weight", f"self_attn.{name}_norm.weight", width)


def _describe_attention(writer: GGUFWriter, config: Config) -> None:
    width = head_width(config)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)


def _router_and_experts(
    config: Config, layer: Layer, block: str, inner: int, gate: str, down: str, up: str
) -> Iterator[Tensor]:
    """`block`: the module with both; `gate`, `down` and `up`: names of an expert's matrices."""
    hidden, count = config["hidden_size"], expert_count(config)
    experts = f"{block}.experts.{{}}"
    yield layer.exact("ffn_gate_inp.weight", f"{block}.gate.weight", count, hidden)
    yield layer.experts("ffn_gate_exps", f"{experts}.{gate}", count, inner, hidden)
    yield layer.experts("ffn_down_exps", f"{experts}.{down}", count, hidden, inner)
    yield layer.experts("ffn_up_exps", f"{experts}.{up}", count, inner, hidden)


def _feed_forward(layer: Layer, end: str, module: str, hidden: int, inner: int) -> Iterator[Tensor]:
    """One that every token passes through; `end` ends the names of its matrices."""
    for name, shape in (("gate", (inner, hidden)), ("down", (hidden, inner)), ("up", (inner, hidden))):
        yield layer.matrix(f"ffn_{name}{end}", f"{module}.{name}_proj", *shape)


def _norms(config: Config, layer: Layer, second: str = "ffn_norm") -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield layer.exact("attn_norm.weight", "input_layernorm.weight", hidden)
    yield layer.exact(f"{second}.weight", "post_attention_layernorm.weight", hidden)


def _mixtral(config: Config, layer: Layer) -> Iterator[Tensor]:
    yield from _attention(config, layer, paired=True)
    inner = config["intermediate_size"]
    yield from _router_and_experts(config, layer, "block_sparse_moe", inner, "w1", "w2", "w3")
    yield from _norms(config, layer)


def _describe_mixtral(writer: GGUFWriter, config: Config) -> None:
    _describe_attention(writer, config)
    writer.add_expert_feed_forward_length(config["intermediate_size"])


PROJECTIONS = ("gate_proj", "down_proj", "up_proj")


def _qwen3_moe(config: Config, layer: Layer) -> Iterator[Tensor]:
    yield from _attention(config, layer, norms=True)
    yield from _router_and_experts(config, layer, "mlp", config["moe_intermediate_size"], *PROJECTIONS)
    yield from _norms(config, layer)


def _describe_qwen3_moe(writer: GGUFWriter, config: Config) -> None:
    _describe_attention(writer, config)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


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
        yield from _feed_forward(layer, "", "mlp", hidden, config["intermediate_size"])
    else:
        inner = config["moe_intermediate_size"]
        yield from _router_and_experts(config, layer, "mlp", inner, *PROJECTIONS)
        yield layer.exact("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", expert_count(config))
        shared = inner * config["n_shared_experts"]
        yield from _feed_forward(layer, "_shexp", "mlp.shared_experts", hidden, shared)
    yield from _norms(config, layer)


def _describe_deepseek(writer: GGUFWriter, config: Config) -> None:
    """llama.cpp's heads of attention are as wide as the latents, and all share one of keys and values; their
    widths in the model ("mla") are written beside."""
    if not config.get("rope_interleave", True) or config.get("attention_bias") or not config["q_lora_rank"]:
        raise ValueError(
            "latent attention is written as GGUF only if it rotates pairs, has q_lora_rank, and no biases"
        )
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
    layers = config["num_hidden_layers"]
    types = config.get("mlp_layer_types")
    if types is None:
        return min(int(config["first_k_dense_replace"]), layers)
    count = types.index("sparse") if "sparse" in types else layers
    if types[count:] != ["sparse"] * (layers - count):
        raise ValueError("llama.cpp has layers without experts only before those with experts")
    return count


ARCHITECTURES = {
    "mixtral": Architecture("llama", _mixtral, _describe_mixtral),
    "qwen3_moe": Architecture("qwen3moe", _qwen3_moe, _describe_qwen3_moe),
    "deepseek_v3": Architecture("deepseek2", _deepseek, _describe_deepseek),
    "glm4_moe_lite": Architecture("deepseek2", _deepseek, _describe_deepseek),
}
"""By the model type of transformers."""
