"""gpt-oss as GGUF: biases, attention sinks, and experts in MXFP4, as in all published files of it.

Runs in the peer's environment, as gguf_file.py, which writes the files; sources in gguf_architectures.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize
from gguf_layer import (
    Architecture,
    Config,
    Layer,
    attention,
    describe_attention,
    expert_count,
    head_width,
    norms_of,
)
from gguf_tensor import FLOAT32, MXFP4, Array, Read, Tensor


def _layer(config: Config, layer: Layer) -> Iterator[Tensor]:
    hidden, width = config["hidden_size"], head_width(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield from attention(config, layer)
    for name, source, rows in (
        ("q", "q", heads * width),
        ("k", "k", kv_heads * width),
        ("v", "v", kv_heads * width),
        ("output", "o", hidden),
    ):
        yield layer.exact(f"attn_{name}.bias", f"self_attn.{source}_proj.bias", rows)
    yield layer.exact("attn_sinks.weight", "self_attn.sinks", heads)
    count = expert_count(config)
    yield layer.exact("ffn_gate_inp.weight", "mlp.router.weight", count, hidden)
    yield layer.exact("ffn_gate_inp.bias", "mlp.router.bias", count)
    yield from _experts(config, layer)
    yield from norms_of(config, layer, second="post_attention_norm")


def _experts(config: Config, layer: Layer) -> Iterator[Tensor]:
    """Checkpoints have the rows of gate and up in turns, in one tensor."""
    count, hidden, inner = expert_count(config), config["hidden_size"], config["intermediate_size"]
    packed = (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
    kind = FLOAT32 if layer.matrices == FLOAT32 else MXFP4
    for name, source, own, rows, columns in (
        ("gate", "gate_up_proj", slice(0, None, 2), inner, hidden),
        ("down", "down_proj", slice(None), hidden, inner),
        ("up", "gate_up_proj", slice(1, None, 2), inner, hidden),
    ):
        full = layer.source(f"mlp.experts.{source}")

        def matrices(read: Read, full: str = full, own: slice = own) -> Iterator[Array]:
            """Of all experts, [rows, columns] each."""
            if not packed:  # [E, columns, rows]
                yield from (expert.T[own] for expert in read(full))
                return
            for blocks, scales in zip(read(f"{full}_blocks"), read(f"{full}_scales"), strict=True):
                yield from_blocks(blocks[own], scales[own], kind)

        def biases(read: Read, full: str = full, own: slice = own) -> Iterator[Array]:
            yield read(f"{full}_bias")[:, own]

        stem = f"blk.{layer.index}.ffn_{name}_exps"
        yield Tensor(f"{stem}.weight", (count, rows, columns), kind, matrices)
        yield Tensor(f"{stem}.bias", (count, rows), FLOAT32, biases)


def from_blocks(blocks: Array, scales: Array, kind: GGMLQuantizationType) -> Array:
    """A checkpoint's blocks as llama.cpp stores them, or as float32.

    blocks: uint8 [rows, blocks of 32, 16], two neighbouring numbers a byte; llama.cpp has numbers i and
    i + 16 in byte i. scales: uint8 [rows, blocks], exponents, which come first in llama.cpp's blocks.
    """
    numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    paired = numbers[..., :16] | numbers[..., 16:] << 4
    stored = np.concatenate([scales[..., None], paired], axis=-1).reshape(len(blocks), -1)
    return dequantize(stored, MXFP4) if kind == FLOAT32 else stored


def _describe(writer: GGUFWriter, config: Config) -> None:
    types = config.get("layer_types", [])
    if types[::2].count("sliding_attention") + types[1::2].count("full_attention") != len(types):
        raise ValueError("llama.cpp computes gpt-oss only with a sliding window in layers 0, 2, 4 and so on")
    if config.get("swiglu_alpha", 1.702) != 1.702 or config.get("swiglu_limit", 7.0) != 7.0:
        raise ValueError("llama.cpp computes gpt-oss only with swiglu_alpha 1.702 and swiglu_limit 7")
    describe_attention(writer, config)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


GPT_OSS = Architecture("gpt-oss", _layer, _describe, mostly="MXFP4_MOE")
