"""The tensors that decoder layers of several families have, under llama.cpp's names and in checkpoints.

Runs in the peer's environment, as gguf_file.py, which writes the files; sources in gguf_architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType, GGUFWriter
from gguf_tensor import FLOAT32, Array, Read, Tensor

Config = dict[str, Any]
"""The fields of a model's config.json."""
Turn = Callable[[Array], Array]
"""What must be done to a checkpoint's weight: a view of it, or a reordering."""

PROJECTIONS = ("gate_proj", "down_proj", "up_proj")


@dataclass(frozen=True)
class Layer:
    """Makes the tensors of one decoder layer, whose names are given without the layer's prefix."""

    index: int
    matrices: GGMLQuantizationType
    """The type of its matrices."""

    def exact(self, name: str, source: str, *shape: int, turn: Turn | None = None) -> Tensor:
        """A tensor in float32; both names are whole, such as "attn_norm.weight"."""
        return Tensor(f"blk.{self.index}.{name}", shape, FLOAT32, whole(self.source(source), turn))

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
    """The tensors of a decoder layer."""
    describe: Callable[[GGUFWriter, Config], None]
    """Writes the metadata that not all have."""
    norm: Turn | None = None
    """For the weights of norms, the one after the last layer included."""
    mostly: str = ""
    """The type of most of its numbers, in a file of any type but F32; "" for that of its matrices."""
    fields: Callable[[Config], Config] = dict
    """The config with the names and fields that most have."""
    prefix: str = "model."
    """What names in checkpoints begin with, but for the output head's; asked for as "model."."""
    embedding: str = "model.embed_tokens"
    """The module of the input embedding."""
    last_norm: str = "model.norm"
    """The module of the norm after the last layer."""


def whole(name: str, turn: Turn | None = None) -> Callable[[Read], Iterable[Array]]:
    """A tensor's only part: the checkpoint's tensor of this name, after `turn`."""
    return lambda read: [read(name) if turn is None else turn(read(name))]


def expert_count(config: Config) -> int:
    """The number of routed experts; later releases of transformers use Mixtral's name for more models."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return int(next(config[name] for name in names if name in config))


def head_width(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope(config: Config) -> Config:
    """The parameters of rotary embedding, which older configs have only if positions are scaled."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_theta(config: Config) -> float | None:
    """The base of rotary embedding: in configs by transformers 5 among the rope parameters, in older ones at
    the top level. None for models without rotary embedding."""
    theta = config.get("rope_theta", rope(config).get("rope_theta"))
    return None if theta is None else float(theta)


def in_pairs(heads: int) -> Turn:
    """For rows of heads with rotary embedding: llama.cpp rotates rows 2i and 2i + 1 of a head together,
    transformers rows i and i + width / 2."""

    def turn(weight: Array) -> Array:
        halves = weight.reshape(heads, 2, -1, weight.shape[-1])
        return halves.swapaxes(1, 2).reshape(weight.shape)

    return turn


def attention(
    config: Config,
    layer: Layer,
    *,
    paired: bool = False,
    gated: bool = False,
    norms: bool = False,
    norm: Turn | None = None,
    module: str = "self_attn",
) -> Iterator[Tensor]:
    """Attention with a matrix each for queries, keys and values. `gated`: each head of queries is followed by
    a gate for its output. `norms`: queries and keys have some, to which `norm` is done. `module`: its name in
    a layer."""
    hidden, width = config["hidden_size"], head_width(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k = (in_pairs(heads), in_pairs(kv_heads)) if paired else (None, None)
    yield layer.matrix("attn_q", f"{module}.q_proj", (1 + gated) * heads * width, hidden, turn=q)
    yield layer.matrix("attn_k", f"{module}.k_proj", kv_heads * width, hidden, turn=k)
    yield layer.matrix("attn_v", f"{module}.v_proj", kv_heads * width, hidden)
    yield layer.matrix("attn_output", f"{module}.o_proj", hidden, heads * width)
    for name in "qk" if norms else "":
        yield layer.exact(f"attn_{name}_norm.weight", f"{module}.{name}_norm.weight", width, turn=norm)


def describe_attention(writer: GGUFWriter, config: Config, turned: int | None = None) -> None:
    """`turned`: how much of a head has rotary embedding, by default all."""
    width = head_width(config)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(turned or width)


def router_and_experts(
    config: Config, layer: Layer, block: str, inner: int, gate: str, down: str, up: str
) -> Iterator[Tensor]:
    """`block`: the module with both; `gate`, `down` and `up`: names of an expert's matrices."""
    hidden, count = config["hidden_size"], expert_count(config)
    experts = f"{block}.experts.{{}}"
    yield layer.exact("ffn_gate_inp.weight", f"{block}.gate.weight", count, hidden)
    yield layer.experts("ffn_gate_exps", f"{experts}.{gate}", count, inner, hidden)
    yield layer.experts("ffn_down_exps", f"{experts}.{down}", count, hidden, inner)
    yield layer.experts("ffn_up_exps", f"{experts}.{up}", count, inner, hidden)


def feed_forward(layer: Layer, end: str, module: str, hidden: int, inner: int) -> Iterator[Tensor]:
    """One that every token passes through; `end` ends the names of its matrices."""
    for name, shape in (("gate", (inner, hidden)), ("down", (hidden, inner)), ("up", (inner, hidden))):
        yield layer.matrix(f"ffn_{name}{end}", f"{module}.{name}_proj", *shape)


def norms_of(
    config: Config, layer: Layer, second: str = "ffn_norm", norm: Turn | None = None
) -> Iterator[Tensor]:
    """A layer's two norms; `second`: llama.cpp's name of the second."""
    hidden = config["hidden_size"]
    yield layer.exact("attn_norm.weight", "input_layernorm.weight", hidden, turn=norm)
    yield layer.exact(f"{second}.weight", "post_attention_layernorm.weight", hidden, turn=norm)
