"""Write a Mixtral or Qwen3-MoE checkpoint (safetensors, transformers' names) as a GGUF file of llama.cpp.

All matrices have one type, input embedding and output head included; norms and routers are float32. A layer's
experts are stacked, [E, out, in]. The file has no tokenizer: prompts are token ids.

With --random the weights are made here, in a checkpoint's shapes and at about its scale, without reading any:
a model that is only measured need not be written in bf16 first.

Runs in the peer's environment, which has numpy and the `gguf` package but neither torch nor moe_local.
Sources: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md), and the tensor names that the
architectures "llama" and "qwen3moe" of llama.cpp expect.

    python gguf_file.py CHECKPOINT OUT.gguf [--type Q4_0] [--random]
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape, quantize

Array = np.ndarray[Any, Any]
PIECE_ROWS = 1024
"""Rows that a thread quantizes at once."""
Q4_0_DEVIATION = math.sqrt((16**2 - 1) / 12)
"""Standard deviation of sixteen equally likely levels, one apart."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file and how to make it: `parts` are stacked, each [shape[-2], shape[-1]]."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    parts: tuple[str, ...]
    heads: int = 0
    """Number of heads with rotary embedding whose rows must be reordered in pairs; 0: no reordering."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in float32 numbers or, for a quantized type, in bytes."""
        return self.shape if self.type == FLOAT32 else quant_shape_to_byte_shape(self.shape, self.type)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.type == FLOAT32 else np.uint8)

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize


FLOAT32 = gguf.GGMLQuantizationType.F32


class Safetensors:
    """The tensors of a checkpoint folder by name, as float32; read from the files when asked for."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, tuple[mmap.mmap, int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = 8 + int.from_bytes(view[:8], "little")
            header = json.loads(view[8:start])
            header.pop("__metadata__", None)
            self._tensors |= {name: (view, start, entry) for name, entry in header.items()}

    def read(self, name: str) -> Array:
        """A new array. Raises KeyError for unknown names and dtypes."""
        view, start, entry = self._tensors[name]
        dtype = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[entry["dtype"]]
        begin, _ = entry["data_offsets"]
        raw = np.frombuffer(view, dtype, math.prod(entry["shape"]), start + begin).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # bf16 is the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)


@dataclass(frozen=True)
class Architecture:
    """A model type's names in llama.cpp and in transformers, and its properties."""

    name: str
    """llama.cpp's name of the architecture."""
    block: str
    """Name of a decoder layer's MoE block in transformers' checkpoints."""
    matrices: dict[str, str]
    """Names of an expert's matrices: llama.cpp's -> transformers'."""
    inner: str
    """The field of config.json that holds the width of experts."""
    paired: bool
    """Whether llama.cpp applies rotary embedding to neighbouring pairs of a head's rows."""
    norms: bool
    """Whether queries and keys have norms."""


ARCHITECTURES = {
    "mixtral": Architecture(
        "llama",
        block="block_sparse_moe",
        matrices={"gate": "w1", "down": "w2", "up": "w3"},
        inner="intermediate_size",
        paired=True,
        norms=False,
    ),
    "qwen3_moe": Architecture(
        "qwen3moe",
        block="mlp",
        matrices={"gate": "gate_proj", "down": "down_proj", "up": "up_proj"},
        inner="moe_intermediate_size",
        paired=False,
        norms=True,
    ),
}


def expert_count(config: dict[str, Any]) -> int:
    """The number of experts; later releases of transformers use Mixtral's field name for every model."""
    return int(config["num_local_experts" if "num_local_experts" in config else "num_experts"])


def head_width(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def tensors(config: dict[str, Any], matrices: gguf.GGMLQuantizationType) -> Iterator[Tensor]:
    """All tensors, in the order of the file."""
    kind = ARCHITECTURES[config["model_type"]]
    hidden, inner, vocab = config["hidden_size"], config[kind.inner], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    experts, width = expert_count(config), head_width(config)
    yield Tensor("token_embd.weight", (vocab, hidden), matrices, ("model.embed_tokens.weight",))
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        for name, out, columns, rotated in (
            ("q", heads * width, hidden, heads),
            ("k", kv_heads * width, hidden, kv_heads),
            ("v", kv_heads * width, hidden, 0),
            ("output", hidden, heads * width, 0),
        ):
            source = f"{layer}.self_attn.{name[0]}_proj.weight"
            paired = rotated if kind.paired else 0
            yield Tensor(f"{block}.attn_{name}.weight", (out, columns), matrices, (source,), paired)
        for name in "qk" if kind.norms else "":
            source = f"{layer}.self_attn.{name}_norm.weight"
            yield Tensor(f"{block}.attn_{name}_norm.weight", (width,), FLOAT32, (source,))
        router = f"{layer}.{kind.block}.gate.weight"
        yield Tensor(f"{block}.ffn_gate_inp.weight", (experts, hidden), FLOAT32, (router,))
        for name, source in kind.matrices.items():
            shape = (experts, hidden, inner) if name == "down" else (experts, inner, hidden)
            parts = tuple(f"{layer}.{kind.block}.experts.{e}.{source}.weight" for e in range(experts))
            yield Tensor(f"{block}.ffn_{name}_exps.weight", shape, matrices, parts)
        yield Tensor(f"{block}.attn_norm.weight", (hidden,), FLOAT32, (f"{layer}.input_layernorm.weight",))
        after = f"{layer}.post_attention_layernorm.weight"
        yield Tensor(f"{block}.ffn_norm.weight", (hidden,), FLOAT32, (after,))
    yield Tensor("output_norm.weight", (hidden,), FLOAT32, ("model.norm.weight",))
    yield Tensor("output.weight", (vocab, hidden), matrices, ("lm_head.weight",))


def make(tensor: Tensor, read: Callable[[str], Array], pool: ThreadPoolExecutor) -> Array:
    """The tensor in its stored form."""
    if tensor.type == FLOAT32:
        return np.stack([_paired(tensor, read(name)) for name in tensor.parts]).reshape(tensor.shape)
    out = np.empty((len(tensor.parts), *tensor.stored_shape[-2:]), np.uint8)
    for part, name in zip(out, tensor.parts, strict=True):
        weights = _paired(tensor, read(name))
        starts = range(0, len(weights), PIECE_ROWS)
        pieces = pool.map(lambda at, w=weights: quantize(w[at : at + PIECE_ROWS], tensor.type), starts)
        for at, piece in zip(starts, pieces, strict=True):
            part[at : at + PIECE_ROWS] = piece
    return out.reshape(tensor.stored_shape)


def make_random(tensor: Tensor, rng: np.random.Generator) -> Array:
    """Random weights, at about the scale at which a matrix's output is as large as its input; norms are ones.

    Q4_0 blocks are made directly in their stored form: for each 32 numbers a float16 scale, and sixteen bytes
    of two 4-bit numbers each, in which 8 stands for 0 (ggml-common.h, block_q4_0).
    """
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32)
    scale = 1 / math.sqrt(tensor.shape[-1])
    if tensor.type == FLOAT32:
        return rng.standard_normal(tensor.shape, np.float32) * np.float32(scale)
    if tensor.type != gguf.GGMLQuantizationType.Q4_0:
        raise ValueError(f"no random weights are made of type {tensor.type.name}; use Q4_0")
    blocks = np.frombuffer(rng.bytes(tensor.nbytes), np.uint8).reshape(-1, 18).copy()
    step = rng.uniform(0.8, 1.2, len(blocks)) * scale / Q4_0_DEVIATION
    blocks[:, :2] = step.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(tensor.stored_shape)


def _paired(tensor: Tensor, weights: Array) -> Array:
    """Rotated heads in llama.cpp's order: it rotates rows 2i and 2i + 1 together, transformers rows i and
    i + width / 2."""
    if not tensor.heads:
        return weights
    halves = weights.reshape(tensor.heads, 2, -1, weights.shape[-1])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write(
    folder: Path, out: Path, matrices: gguf.GGMLQuantizationType, threads: int = 2, *, random: bool = False
) -> None:
    """Write `out` from the checkpoint in `folder`, or with `random` from its config.json alone.

    Needs memory for one stacked tensor and its quantized form. `out` appears only once it is complete. Raises
    ValueError for a model type that is not in ARCHITECTURES.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise ValueError(f"{folder} holds a {config['model_type']!r}; only {known} are written as GGUF")
    source, rng = Safetensors(folder), np.random.default_rng(0)
    all_tensors = list(tensors(config, matrices))
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[config["model_type"]].name)
    _describe(writer, config, matrices)
    for tensor in all_tensors:
        raw = None if tensor.type == FLOAT32 else tensor.type
        writer.add_tensor_info(tensor.name, tensor.stored_shape, tensor.stored_dtype, tensor.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for number, tensor in enumerate(all_tensors, start=1):
            made = make_random(tensor, rng) if random else make(tensor, source.read, pool)
            writer.write_tensor_data(made)
            seconds = time.monotonic() - started
            if tensor.name.endswith("ffn_norm.weight"):  # the last tensor of a layer
                done = f"{number} of {len(all_tensors)} tensors"
                print(f"{out.name}: {done}, {seconds:.0f} s", file=sys.stderr)
    writer.close()
    partial.replace(out)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], matrices: gguf.GGMLQuantizationType) -> None:
    kind = ARCHITECTURES[config["model_type"]]
    writer.add_name(f"synthetic {config['model_type']}")
    writer.add_file_type(
        int(gguf.LlamaFileType[f"MOSTLY_{matrices.name}" if matrices != FLOAT32 else "ALL_F32"])
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    width = head_width(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_expert_feed_forward_length(config[kind.inner])
    writer.add_expert_count(expert_count(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])


def rope_theta(config: dict[str, Any]) -> float:
    """The base of rotary embedding: in configs by transformers 5 among the rope parameters, in older ones at
    the top level."""
    return float(config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint as GGUF.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--type", default="Q4_0", choices=["Q4_0", "Q8_0", "F32"])
    parser.add_argument("--random", action="store_true", help="make weights, read only the shapes")
    options = parser.parse_args()
    kind = gguf.GGMLQuantizationType[options.type]
    write(options.checkpoint, options.out, kind, random=options.random)


if __name__ == "__main__":
    main()
