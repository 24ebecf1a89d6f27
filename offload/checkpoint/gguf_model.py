"""Translates a GGUF file's metadata and tensor names to those of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.gguf_description import Description, Fields
from moe_local.offload.checkpoint.gguf_families import family_of
from moe_local.offload.checkpoint.gguf_family import Family, Undo
from moe_local.offload.checkpoint.gguf_file import GgufFile
from moe_local.offload.checkpoint.weights import Weight
from moe_local.offload.quantize.gguf import FORMATS, dequantize_gguf

WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
"""The modules of a layer that are called the same in most families."""
GATE_AND_UP = ("ffn_gate_exps", "ffn_up_exps")
EXPERTS = {
    **dict.fromkeys((*GATE_AND_UP, "ffn_gate_up_exps"), "gate_up_proj"),
    "ffn_down_exps": "down_proj",
}
"""The experts' parameters. Each of these tensors is [E, out, in], its bias [E, out]."""


def config_fields(file: GgufFile) -> Fields:
    """The fields of a config.json that corresponds to the file's metadata.

    Raises CheckpointError for an unsupported architecture, and for sizes that are missing or absurd.
    """
    family, described = family_of(file.path, file.metadata), Description(file)
    embedding = file.weights.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight; get the file again")
    own = family.fields(described)
    if "num_key_value_heads" not in own:
        own["num_key_value_heads"] = described.key_value_heads()
    return {
        "hidden_size": described.number("embedding_length"),
        "num_hidden_layers": described.layers(),
        "num_attention_heads": described.number("attention.head_count"),
        "head_dim": described.head_dim(),
        "rms_norm_eps": described.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": described.number("context_length"),
        "num_experts_per_tok": described.number("expert_used_count"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.weights,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(file),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    } | own


def _ends(file: GgufFile) -> Any:
    """The tokens that end an answer: a text's end, a turn's, a message's, and others that Ollama lists."""
    said = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    listed = file.metadata.get("tokenizer.ggml.eos_token_ids")
    ends = list(
        dict.fromkeys(t for t in (*said, *(listed if isinstance(listed, tuple) else ())) if t is not None)
    )
    return ends if len(ends) > 1 else said[0]


def model_weights(file: GgufFile, config: Any) -> Iterator[Weight]:
    """The file's weights under the model's names, except for packed experts, which keep the file's names.

    Weights that the model does not have (rotary frequencies, layers that predict further tokens) are left
    out.
    """
    family = family_of(file.path, file.metadata)
    weights = _with_scales(file, family)
    config = config.get_text_config(decoder=True)
    layers = config.num_hidden_layers
    try:
        undo, joins = {"ffn_gate_inp_shexp": _as_row, **family.undo(config)}, family.joins(config)
    except AttributeError as error:
        raise CheckpointError(
            f"{file.path} is a file of {family.name}, and config.json beside it describes a "
            f"{config.model_type}; remove that or put the model's own there"
        ) from error
    modules = {**BLOCK, **family.names}
    for number in range(layers):
        for parameter, (parts, join) in joins.items():
            found = [weight for part in parts if (weight := weights.get(f"blk.{number}.{part}"))]
            if len(found) == len(parts):
                yield _joined(found, f"model.layers.{number}.{parameter}", join, file.shards.remedy)
    for key, weight in weights.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?((\w+)(?:\.(weight|bias|scale))?)", key)
        if match is None or (match[1] is not None and int(match[1]) >= layers):
            continue
        layer, whole, name, kind = match.groups()
        if layer is None and name in WHOLE:
            yield _converted(weight, f"{WHOLE[name]}.{kind}", undo.get(name))
        elif layer is not None and whole in modules:
            yield _converted(weight, f"model.layers.{layer}.{modules[whole]}", undo.get(name))
        elif layer is not None and name in EXPERTS:
            yield weight
        elif layer is not None and name in modules:
            yield _converted(weight, f"model.layers.{layer}.{modules[name]}.{kind}", undo.get(name))


@dataclass(frozen=True, slots=True)
class _Scaled:
    """Decodes blocks and multiplies them by one scale, or by one for each expert; a PackedDecoder."""

    format: str
    undo: Undo | None = None

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        blocks, scale = parts
        numbers = dequantize_gguf(blocks, self.format)
        numbers.mul_(scale.float().view(-1, *[1] * (numbers.dim() - 1)))
        return numbers if self.undo is None else self.undo(numbers)


def _with_scales(file: GgufFile, family: Family) -> dict[str, Weight]:
    """The file's weights. Those in NVFP4 have a second scale, a tensor of its own ("attn_q.scale"), which is
    made part of them. Gemma 4 has tensors of such names that are the model's.

    Raises CheckpointError for a scale that does not fit.
    """
    weights = dict(file.weights)
    for key, scale in file.weights.items():
        name = key.removesuffix(".scale")
        weight = file.weights.get(f"{name}.weight")
        if name == key or weight is None or key.split(".", 2)[-1] in family.names:
            continue
        scale.check(file.shards.remedy)
        fits = scale.format == "plain" and scale.shape == (weight.shape[:-2] or (1,))
        if weight.format not in FORMATS or not fits:
            raise CheckpointError(
                f"{key} {list(scale.shape)} in {scale.parts[0].shard} is no scale of {weight.key} "
                f"{list(weight.shape)} ({weight.format}); {file.shards.remedy}"
            )
        parts = (*weight.parts, *scale.parts)
        weights[weight.key] = replace(weight, parts=parts, decoder=_Scaled(weight.format))
        del weights[key]
    return weights


@dataclass(frozen=True, slots=True)
class _Joined:
    """Decodes weights and joins them; a PackedDecoder."""

    weights: tuple[Weight, ...]
    join: Callable[..., torch.Tensor]

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        stored = iter(parts)
        return self.join(*(weight.decode([next(stored) for _ in weight.parts]) for weight in self.weights))


def _joined(weights: Sequence[Weight], key: str, join: Callable[..., torch.Tensor], remedy: str) -> Weight:
    for weight in weights:
        weight.check(remedy)
    try:
        shape = tuple(join(*(torch.empty(weight.shape, device="meta") for weight in weights)).shape)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise _misfit(weights[0]) from error
    parts = tuple(part for weight in weights for part in weight.parts)
    return Weight(key, shape, parts, "joined", decoder=_Joined(tuple(weights), join))


def _misfit(weight: Weight) -> CheckpointError:
    return CheckpointError(
        f"{weight.key} in {weight.parts[0].shard} has shape {list(weight.shape)}, which does not fit the "
        "config; config and weights do not match"
    )


def _converted(weight: Weight, key: str, undo: Undo | None) -> Weight:
    if undo is None:
        return replace(weight, key=key)
    try:
        shape = tuple(undo(torch.empty(weight.shape, device="meta")).shape)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise _misfit(weight) from error
    decoder = replace(weight.decoder, undo=undo) if isinstance(weight.decoder, _Scaled) else weight.decoder
    return replace(weight, key=key, shape=shape, undo=undo, decoder=decoder)


def _as_row(gate: torch.Tensor) -> torch.Tensor:
    """The converter drops the first dimension of a matrix with one row."""
    return gate.reshape(1, -1)


def expert_part(key: str) -> tuple[int, str, str] | None:
    """(the layer, the experts' parameter, the part of it) that the packed experts `key` are.

    None for other weights. A part is a tensor's name without its layer.
    """
    match = re.fullmatch(r"blk\.(\d+)\.((ffn_\w+_exps)\.(weight|bias))", key)
    if match is None or match[3] not in EXPERTS:
        return None
    return int(match[1]), EXPERTS[match[3]] + ("_bias" if match[4] == "bias" else ""), match[2]


def expert_parts(part: str) -> list[str]:
    """The parts that are joined with `part`, and itself, in order: gate before up."""
    name, _, kind = part.partition(".")
    return [f"{x}.{kind}" for x in GATE_AND_UP] if name in GATE_AND_UP else [part]
