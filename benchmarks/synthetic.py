"""Write a Mixtral checkpoint of random weights in the published layout, at any size.

The layout is that of mistralai/Mixtral-8x7B-Instruct-v0.1: 19 shards model-000xx-of-00019.safetensors and
model.safetensors.index.json, bf16, `block_sparse_moe.experts.N.w1|w2|w3.weight`. With the true widths and a
few layers, it serves to measure conversion and loading where the 87 GiB of the real checkpoint do not fit.
Tensors are made and written one by one, so memory holds one of them (112 MiB at the true widths).

    python benchmarks/synthetic.py OUT --layers 4 --hidden 4096 --intermediate 14336 --seed 0
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SHARDS = 19
CHUNK = 1 << 24
"""Numbers drawn at once."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Mixtral model; the defaults are those of 8x7B."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    experts: int = 8
    top_k: int = 2
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000
    max_context: int = 32768

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(key, shape) of every tensor, in the order of the published shards."""
        width = self.hidden // self.heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.self_attn.q_proj.weight", (self.heads * width, self.hidden)
            yield f"{layer}.self_attn.k_proj.weight", (self.kv_heads * width, self.hidden)
            yield f"{layer}.self_attn.v_proj.weight", (self.kv_heads * width, self.hidden)
            yield f"{layer}.self_attn.o_proj.weight", (self.hidden, self.heads * width)
            yield f"{layer}.block_sparse_moe.gate.weight", (self.experts, self.hidden)
            for e in range(self.experts):
                expert = f"{layer}.block_sparse_moe.experts.{e}"
                yield f"{expert}.w1.weight", (self.intermediate, self.hidden)
                yield f"{expert}.w2.weight", (self.hidden, self.intermediate)
                yield f"{expert}.w3.weight", (self.intermediate, self.hidden)
            yield f"{layer}.input_layernorm.weight", (self.hidden,)
            yield f"{layer}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)


NAMED_SHAPES = {
    "mixtral-8x7b": Shape(),
    "mixtral-tiny": Shape(64, 128, layers=3, heads=4, kv_heads=2, vocab=512, max_context=4096),
}
"""Shapes that benchmarks can name; the tiny one is for trying them out."""


def mixtral_19_shards(folder: Path, shape: Shape, seed: int = 0, quiet: bool = True) -> int:
    """Write config, 19 shards and their index into `folder` (made if absent); returns the tensors' bytes.

    The same shape and seed give the same bytes. A shard that exists already is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, shape)
    tensors = list(shape.tensors())
    total = sum(_nbytes(size) for _, size in tensors)
    weight_map: dict[str, str] = {}
    written, started = 0, time.monotonic()
    for number, group in enumerate(_split(tensors, SHARDS), start=1):
        name = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= {key: name for key, _ in group}
        _write_shard(folder / name, group, seed)
        written += sum(_nbytes(size) for _, size in group)
        if not quiet:
            seconds = time.monotonic() - started
            print(
                f"{name}  {written / 2**30:.2f} of {total / 2**30:.2f} GiB  {seconds:.0f} s", file=sys.stderr
            )
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
    return total


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _split(
    tensors: Sequence[tuple[str, tuple[int, ...]]], groups: int
) -> Iterator[Sequence[tuple[str, tuple[int, ...]]]]:
    """Consecutive runs of about equal bytes, none empty."""
    if len(tensors) < groups:
        raise ValueError(f"{len(tensors)} tensors cannot fill {groups} shards; use more layers or experts")
    left, start = sum(_nbytes(shape) for _, shape in tensors), 0
    for group in range(groups, 0, -1):
        stop, taken = start, 0
        while stop == start or (taken < left / group and len(tensors) - stop > group - 1):
            taken += _nbytes(tensors[stop][1])
            stop += 1
        stop = len(tensors) if group == 1 else stop
        yield tensors[start:stop]
        left, start = left - taken, stop


def _write_shard(path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], seed: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "seed": str(seed)}}
    end = 0
    for key, shape in tensors:
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _nbytes(shape)]}
        end += _nbytes(shape)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    head = len(raw).to_bytes(8, "little") + raw
    if path.is_file() and path.stat().st_size == len(head) + end:
        with open(path, "rb") as file:
            if file.read(len(head)) == head:
                return
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(head)
        for key, shape in tensors:
            for chunk in _weights(key, shape, seed):
                file.write(chunk.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _weights(key: str, shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """The tensor's numbers in chunks of bf16 [<= CHUNK]. Matrices are scaled so that their output is about as
    large as their input (of routers and the head, three times as large); norms are ones."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    gain = 3.0 if "gate" in key or "lm_head" in key else 1.0
    scale = 1.0 if "embed" in key else gain / math.sqrt(shape[-1])
    numel = math.prod(shape)
    for start in range(0, numel, CHUNK):
        count = min(CHUNK, numel - start)
        if len(shape) == 1:
            yield torch.ones(count, dtype=torch.bfloat16)
        else:
            yield torch.empty(count).normal_(0.0, scale, generator=generator).to(torch.bfloat16)


def _write_config(folder: Path, shape: Shape) -> None:
    config = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_context,
        "model_type": "mixtral",
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    _write(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    _write(folder / "generation_config.json", json.dumps(generation, indent=2).encode() + b"\n")


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a random Mixtral checkpoint in the published layout of 19 shards."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    for name in Shape.__dataclass_fields__:
        default = 4 if name == "layers" else getattr(Shape(), name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}"
        )
    options = vars(parser.parse_args())
    out, seed = options.pop("out"), options.pop("seed")
    total = mixtral_19_shards(out, Shape(**options), seed, quiet=False)
    print(f"{out}: {total / 2**30:.2f} GiB in {SHARDS} shards")


if __name__ == "__main__":
    main()
