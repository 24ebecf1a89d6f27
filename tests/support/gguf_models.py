"""Tiny models as GGUF files, each with a safetensors checkpoint of the weights that must be read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
EXPERT = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}
ARCHITECTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
HALVES: dict[str, tuple[int, ...]] = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Where the float16 scales are in blocks of the types that the gguf package cannot quantize to."""


def write(
    source: Path, folder: Path, kinds: dict[str, str], leave_out: str = "", tokenizer: Any = None
) -> tuple[Path, Path]:
    """Write the tiny checkpoint in `source` as (a GGUF file, its twin in safetensors).

    `kinds` maps suffixes of GGUF's tensor names to types; others are F32. Types that the gguf package cannot
    quantize to get random blocks of about the weights' scale. The twin has the weights that the package
    decodes from the file.
    """
    config = json.loads((source / "config.json").read_text())
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    stacks: dict[str, dict[int, str]] = {}
    plain = {
        k: v.float() for path in sorted(source.glob("*.safetensors")) for k, v in load_file(path).items()
    }
    sources: dict[str, list[str]] = {}
    for key, weight in plain.items():
        if ".experts." in key:
            _, _, layer, _, _, expert, name, _ = key.split(".")
            stacks.setdefault(f"blk.{layer}.ffn_{EXPERT[name]}_exps.weight", {})[int(expert)] = key
        else:
            tensors[_name(key)] = weight.numpy()
            sources[_name(key)] = [key]
    for name, keys in stacks.items():
        sources[name] = [keys[e] for e in sorted(keys)]
        tensors[name] = np.stack([plain[key].numpy() for key in sources[name]])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    _describe(writer, config, tokenizer)
    rng = np.random.default_rng(0)
    for name, numbers in tensors.items():
        if name == leave_out:
            continue
        kind = gguf.GGMLQuantizationType[next((k for end, k in kinds.items() if name.endswith(end)), "F32")]
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        turned = config["model_type"] == "mixtral" and heads is not None
        if turned:
            numbers = (
                numbers.reshape(config[heads], 2, -1, numbers.shape[-1]).swapaxes(1, 2).reshape(numbers.shape)
            )
        if name.endswith("ffn_gate_inp_shexp.weight"):
            numbers = numbers[0]
        if kind.name in HALVES:
            raw = _random_blocks(numbers, kind, rng)
        elif kind == gguf.GGMLQuantizationType.F32:
            raw = np.ascontiguousarray(numbers)
        else:
            raw = gguf.quants.quantize(np.ascontiguousarray(numbers), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        made = gguf.quants.dequantize(raw, kind).astype(np.float32)
        if turned:
            made = made.reshape(config[heads], -1, 2, made.shape[-1]).swapaxes(1, 2).reshape(made.shape)
        parts = made if name in stacks else [made]
        for key, part in zip(sources[name], parts, strict=True):
            plain[key] = torch.from_numpy(np.ascontiguousarray(part)).view(plain[key].shape).clone()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    twin = folder / "twin"
    twin.mkdir()
    (twin / "config.json").write_text(json.dumps(config))
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    return path, twin


def _random_blocks(
    numbers: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Blocks of random codes, which decode to numbers of about the same standard deviation as `numbers`."""
    count, nbytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (*numbers.shape[:-1], numbers.shape[-1] // count, nbytes)
    raw = rng.integers(0, 256, shape, np.uint8)
    scales = rng.uniform(0.5, 1, (len(HALVES[kind.name]), *shape[:-1]))
    for largest in (1.0, 0.0):  # with scales up to 1, then with those that give the wanted deviation
        if not largest:
            flat = raw.reshape(*numbers.shape[:-1], -1)
            largest = numbers.std() / gguf.quants.dequantize(flat, kind).std()
        for at, scale in zip(HALVES[kind.name], scales, strict=True):
            raw[..., at : at + 2] = (largest * scale).astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(*numbers.shape[:-1], -1)


def _name(key: str) -> str:
    if key in NAMES:
        return NAMES[key]
    _, _, layer, *middle, kind = key.split(".")
    return f"blk.{layer}.{LAYER['.'.join(middle)]}.{kind}"


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: Any) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if tokenizer is not None:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens + [f"<unused{n}>" for n in range(len(tokens), config["vocab_size"])])
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_eos_token_id(2)
