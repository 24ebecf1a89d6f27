"""Tiny models as GGUF files, each with a safetensors checkpoint of the weights that must be read from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray[Any, Any]
Turn = Callable[[Array], Array]

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_qkvz.weight": "ssm_in.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "layer_scalar": "layer_output_scale.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    **{f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"},
    **{f"self_attn.{x}_proj.{kind}": f"attn_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")},
    **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
    **{
        f"mlp.{shared}.{x}_proj.weight": f"ffn_{x}_shexp.weight"
        for shared in ("shared_expert", "shared_experts")
        for x in ("gate", "up", "down")
    },
}
EXPERT = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}
ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe": "qwen35moe",
    "gemma4": "gemma4",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
}
POST_ATTENTION = ("gpt_oss", "glm4_moe", "qwen3_next", "qwen3_5_moe", "gemma4")
"""Those whose second norm of a layer is called post_attention_norm."""
OLLAMA = {
    "gpt_oss": {
        "attn_sinks.weight": "attn_sinks",
        "attn_output.weight": "attn_out.weight",
        "attn_output.bias": "attn_out.bias",
        "post_attention_norm.weight": "ffn_norm.weight",
    },
    "qwen3_5_moe": {"ssm_dt.bias": "ssm_dt"},
    "glm4_moe_lite": {},
}
"""What Ollama's own converter calls otherwise."""
HALVES: dict[str, tuple[int, ...]] = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), (0,)),
}
"""Where the float16 scales are in blocks of the types that the gguf package cannot quantize to; see also
`put_scale`."""


class Made(NamedTuple):
    """A tensor of the file before it is quantized, and where what it decodes to goes in the twin."""

    numbers: Array
    put: Callable[[Array], None]


def write(
    source: Path,
    folder: Path,
    kinds: dict[str, str],
    leave_out: str = "",
    tokenizer: Any = None,
    ollama: bool = False,
    split: str = "",
    old: bool = False,
) -> tuple[Path, Path]:
    """Write the tiny checkpoint in `source` as (a GGUF file, its twin in safetensors).

    `kinds` maps suffixes of GGUF's tensor names to types; others are F32. Types that the gguf package cannot
    quantize to get random blocks of about the weights' scale. The twin has the weights that the package
    decodes from the file. `ollama`: as Ollama converts it. `split`: what the file says of how text is
    split for the tokenizer. `old`: as by the converter's first versions, which took no matrix apart.
    """
    config = json.loads((source / "config.json").read_text())
    plain = {
        k: v.float() for path in sorted(source.glob("*.safetensors")) for k, v in load_file(path).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.gguf"
    architecture = ARCHITECTURES[config["model_type"]]
    if ollama:
        architecture = {"gpt_oss": "gptoss", "glm4_moe_lite": "glm4moelite"}.get(
            config["model_type"], architecture
        )
    writer = gguf.GGUFWriter(path, architecture)
    renamed = OLLAMA[config["model_type"]] if ollama else {}
    _describe(writer, config, tokenizer, ollama, split, old)
    rng = np.random.default_rng(0)
    for name, made in _tensors(plain, config, old).items():
        if name == leave_out:
            continue
        kind = gguf.GGMLQuantizationType[next((k for end, k in kinds.items() if name.endswith(end)), "F32")]
        numbers = np.ascontiguousarray(made.numbers)
        scale = None
        if kind.name in (*HALVES, "IQ1_M"):
            raw = _random_blocks(numbers, kind, rng)
        elif kind.name == "NVFP4":
            raw, scale = _random_nvfp4(numbers, rng)
        else:
            raw = numbers if kind.name == "F32" else gguf.quants.quantize(numbers, kind)
        layer, _, rest = name.removeprefix("blk.").partition(".")
        stored = f"blk.{layer}.{renamed[rest]}" if rest in renamed else name
        writer.add_tensor(stored, raw, raw_dtype=kind)
        decoded = gguf.quants.dequantize(raw, kind).astype(np.float32)
        if scale is not None:
            stem = stored.removesuffix(".weight")
            writer.add_tensor(f"{stem}.scale", scale)
            writer.add_tensor(f"{stem}.input_scale", np.ones_like(scale))
            decoded *= scale.reshape(-1, *[1] * (decoded.ndim - 1))
        made.put(decoded)
    if config.get("num_nextn_predict_layers"):  # a last layer that predicts further tokens
        last = config["num_hidden_layers"]
        for name in ("attn_norm.weight", "nextn.enorm.weight"):
            writer.add_tensor(f"blk.{last}.{name}", np.ones(config["hidden_size"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if config["model_type"] == "gemma4":  # whose class for text and images has other names
        config = config["text_config"]
        plain = {key.replace("language_model.", ""): w for key, w in plain.items() if "vision" not in key}
    twin = folder / "twin"
    twin.mkdir()
    (twin / "config.json").write_text(json.dumps(config))
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    return path, twin


def _tensors(plain: dict[str, torch.Tensor], config: dict[str, Any], old: bool) -> dict[str, Made]:
    """The file's tensors by name. Their `put` writes into `plain`."""
    found: dict[str, Made] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for key, weight in plain.items():
        if key.startswith(("model.visual", "model.vision_tower", "model.embed_vision")):
            continue
        match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.*)", key)
        if match is None:
            name = NAMES[key.replace("language_model.", "")]
            found[name] = _turned(weight, _turns(config, name))
            continue
        layer, rest = match.groups()
        if expert := re.fullmatch(r"\w+\.experts\.(\d+)\.(\w+)\.weight", rest):
            name = f"blk.{layer}.ffn_{EXPERT[expert[2]]}_exps.weight"
            stacks.setdefault(name, {})[int(expert[1])] = weight
        elif rest.startswith("mlp.experts."):
            found |= {f"blk.{layer}.{name}": made for name, made in _taken_apart(rest, weight)}
        elif rest == "self_attn.kv_b_proj.weight" and not old:
            both = weight.view(config["num_attention_heads"], -1, weight.shape[1])
            keys, values = both[:, : config["qk_nope_head_dim"]], both[:, config["qk_nope_head_dim"] :]
            for name, view in (("attn_k_b", keys.transpose(1, 2)), ("attn_v_b", values)):
                found[f"blk.{layer}.{name}.weight"] = Made(view.numpy(), partial(_put, view))
        elif rest == "linear_attn.in_proj_qkvz.weight" and not old:
            views = _by_kind(weight, config)
            for name, some in (("attn_qkv", views[:3]), ("attn_gate", views[3:])):
                numbers = np.concatenate([view.flatten(0, 1).numpy() for view in some])
                found[f"blk.{layer}.{name}.weight"] = Made(numbers, partial(_put_rows, some))
        else:
            name = LAYER[rest]
            if rest == "post_attention_layernorm.weight" and config["model_type"] in POST_ATTENTION:
                name = "post_attention_norm.weight"
            found[f"blk.{layer}.{name}"] = _turned(weight, _turns(config, name))
    for name, weights in stacks.items():
        parts = [weights[expert] for expert in sorted(weights)]
        found[name] = Made(np.stack([part.numpy() for part in parts]), partial(_put_each, parts))
    return found


def _turned(weight: torch.Tensor, turns: tuple[Turn, Turn] | None) -> Made:
    there, back = turns or (lambda x: x, lambda x: x)
    return Made(there(weight.numpy()), lambda made: _put_each([weight], [back(made)]))


def _put_each(weights: list[torch.Tensor], made: Any) -> None:
    for weight, part in zip(weights, made, strict=True):
        weight.copy_(torch.from_numpy(np.ascontiguousarray(part)).view(weight.shape))


def _taken_apart(rest: str, weight: torch.Tensor) -> Iterator[tuple[str, Made]]:
    """gpt-oss' packed experts: [E, in, out] becomes [E, out, in], and gate and up, which alternate, two."""
    stem, kind = rest.removesuffix("_bias"), "bias" if rest.endswith("_bias") else "weight"
    turned = weight if kind == "bias" else weight.transpose(1, 2)
    views = {"down": turned}
    if stem.endswith("gate_up_proj"):
        views = {"gate": turned[:, 0::2], "up": turned[:, 1::2]}
    for part, view in views.items():
        yield f"ffn_{part}_exps.{kind}", Made(view.numpy(), partial(_put, view))


def _by_kind(weight: torch.Tensor, config: dict[str, Any]) -> list[torch.Tensor]:
    """Views of Qwen3-Next's queries, keys, values and gates, [heads of keys, rows, D] each."""
    keys, width = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    return list(weight.view(keys, -1, weight.shape[1]).split([width, width, values, values], dim=1))


def _put_rows(views: list[torch.Tensor], made: Array) -> None:
    start = 0
    for view in views:
        rows = view.shape[0] * view.shape[1]
        view.copy_(torch.from_numpy(made[start : start + rows]).view(view.shape))
        start += rows


def _put(view: torch.Tensor, made: Array) -> None:
    view.copy_(torch.from_numpy(made))


def _turns(config: dict[str, Any], name: str) -> tuple[Turn, Turn] | None:
    """What llama.cpp's converter does to a tensor, and what has to be done to undo it."""
    if name == "ffn_gate_inp_shexp.weight":
        return lambda x: x[0], lambda x: x[None]
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}.get(name)
    if config["model_type"] == "mixtral" and heads is not None:
        count = config[heads]
        return (
            lambda x: x.reshape(count, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape),
            lambda x: x.reshape(count, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape),
        )
    linear = config["model_type"] in ("qwen3_next", "qwen3_5_moe")
    return _linear_turns(config.get("text_config", config), name) if linear else None


def _linear_turns(config: dict[str, Any], name: str) -> tuple[Turn, Turn] | None:
    """Norms plus one, decays as they are used; for Qwen3.5, the first value head of each key head first."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    order = np.arange(values)
    if config["model_type"] != "qwen3_next":
        order = order.reshape(keys, values // keys).T.flatten()
    head, before = config["linear_value_head_dim"], 2 * keys * config["linear_key_head_dim"]

    def rows(x: Array, order: Array, width: int, start: int = 0) -> Array:
        index = start + (order[:, None] * width + np.arange(width)).flatten()
        return x[np.concatenate([np.arange(start), index])]

    def reordered(width: int, start: int = 0) -> tuple[Turn, Turn]:
        return (
            lambda x: rows(x, order, width, start),
            lambda x: rows(x, np.argsort(order), width, start),
        )

    if name.endswith("norm.weight") and name != "ssm_norm.weight":
        return lambda x: x + 1, lambda x: x - 1
    if name in ("ssm_alpha.weight", "ssm_beta.weight", "ssm_dt.bias"):
        return reordered(1)
    there, back = reordered(head, before)
    if name == "attn_qkv.weight":
        return there, back
    if name == "ssm_conv1d.weight":
        return lambda x: there(x[:, 0]), lambda x: back(x)[:, None]
    if name == "attn_gate.weight":
        return reordered(head)
    if name == "ssm_out.weight":
        one, other = reordered(head)
        return lambda x: one(x.T).T, lambda x: other(x.T).T
    if name == "ssm_a":
        one, other = reordered(1)
        return lambda x: one(-np.exp(x)), lambda x: torch.log(-torch.from_numpy(other(x))).numpy()
    return None


def _random_blocks(numbers: Array, kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> Array:
    """Blocks of random codes, which decode to numbers of about the same standard deviation as `numbers`."""
    count, nbytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (*numbers.shape[:-1], numbers.shape[-1] // count, nbytes)
    raw = rng.integers(0, 256, shape, np.uint8)
    places = HALVES.get(kind.name, (0,))
    scales = rng.uniform(0.5, 1, (len(places), *shape[:-1]))
    for largest in (1.0, 0.0):  # with scales up to 1, then with those that give the wanted deviation
        if not largest:
            flat = raw.reshape(*numbers.shape[:-1], -1)
            largest = numbers.std() / gguf.quants.dequantize(flat, kind).std()
        for at, scale in zip(places, scales, strict=True):
            put_scale(raw, kind.name, at, (largest * scale).astype(np.float16))
    return raw.reshape(*numbers.shape[:-1], -1)


def put_scale(raw: Array, kind: str, at: int, scale: Array) -> None:
    """Write float16 scales [...] into blocks [..., nbytes]: at byte `at`, or where IQ1_M has its only one."""
    if kind == "IQ1_M":  # in quarters, each above twelve bits of other scales
        for quarter in range(4):
            byte = raw[..., 49 + 2 * quarter]
            byte &= 15
            byte |= ((scale.view(np.uint16) >> (4 * quarter)) & 15).astype(np.uint8) << 4
    else:
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)


def _random_nvfp4(numbers: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Blocks of random codes and a scale for each expert, or one; about the deviation of `numbers`."""
    kind = gguf.GGMLQuantizationType.NVFP4
    count, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (*numbers.shape[:-1], numbers.shape[-1] // count, nbytes), np.uint8)
    raw[..., :4] = rng.integers(0x30, 0x38, (*raw.shape[:-1], 4))  # a half to one
    raw = raw.reshape(*numbers.shape[:-1], -1)
    spread = numbers.std() / gguf.quants.dequantize(raw, kind).std()
    scale = rng.uniform(0.5, 1.5, numbers.shape[:-2] or 1).astype(np.float32)
    return raw, (spread * scale).astype(np.float32)


def _describe(
    writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: Any, ollama: bool, split: str, old: bool
) -> None:
    kind, config = config["model_type"], config.get("text_config", config)
    if kind == "gemma4":
        _describe_gemma4(writer, config)
        return
    rope = config["rope_parameters"]
    further = config.get("num_nextn_predict_layers", 0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"] + further)
    writer.add_head_count(config["num_attention_heads"])
    latent = config.get("kv_lora_rank", 0)
    key_heads = 1 if latent and not old else config["num_key_value_heads"]
    if kind == "qwen3_5_moe" and ollama:
        key_heads = [key_heads if type == "full_attention" else 0 for type in config["layer_types"]]
        writer.add_bool("qwen35moe.ssm.v_head_reordered", True)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if "head_dim" in config and not latent:
        writer.add_key_length(head)
    if kind in ("glm4_moe", "minimax_m2", "qwen3_next", "qwen3_5_moe"):
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    writer.add_expert_count(next(config[name] for name in experts if name in config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if kind in ("glm4_moe", "minimax_m2", "deepseek_v3"):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if latent:
        turned = config["qk_rope_head_dim"]
        widths = config["qk_nope_head_dim"] + turned, config["v_head_dim"]
        writer.add_rope_dimension_count(turned)
        writer.add_kv_lora_rank(latent)
        if config["q_lora_rank"] is not None:
            writer.add_q_lora_rank(config["q_lora_rank"])
        latents = latent + turned, latent
        key, value = widths if old or ollama else latents
        writer.add_key_length(key)
        writer.add_value_length(value)
        if not old:
            key, value = latents if ollama else widths
            writer.add_key_length_mla(key)
            writer.add_value_length_mla(value)
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if kind == "glm4_moe" or latent:
        if not ollama:
            writer.add_expert_group_count(config["n_group"])
            writer.add_expert_group_used_count(config["topk_group"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config.get("first_k_dense_replace", 1))
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        if config.get("norm_topk_prob"):
            writer.add_expert_weights_norm(True)
        if further:
            writer.add_nextn_predict_layers(further)
    if kind == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if ollama:
            writer.add_array("tokenizer.ggml.eos_token_ids", [2, 5])
        else:
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_expert_feed_forward_length(config["intermediate_size"])
    if kind in ("qwen3_next", "qwen3_5_moe"):
        values = config["linear_num_value_heads"]
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(values)
        writer.add_ssm_inner_size(values * config["linear_value_head_dim"])
        writer.add_full_attention_interval(1 + config["layer_types"].index("full_attention"))
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    if tokenizer is not None:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        writer.add_tokenizer_model("gpt2")
        if split:
            writer.add_tokenizer_pre(split)
        unused = config["vocab_size"] - len(tokens)
        writer.add_token_list(tokens + [f"<unused{n}>" for n in range(unused)])
        kinds = dict.fromkeys(tokenizer.get_added_vocab(), gguf.TokenType.CONTROL)
        kinds["<|user|>"] = gguf.TokenType.USER_DEFINED
        types = [kinds.get(token, gguf.TokenType.NORMAL) for token in tokens]
        writer.add_token_types([*types, *[gguf.TokenType.UNUSED] * unused])
        writer.add_chat_template(tokenizer.chat_template)
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_eos_token_id(2)


def _describe_gemma4(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    whole = config["per_layer_config"][str(slides.index(False))]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_embedding_length_per_layer_input(0)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    counts = {True: config["num_key_value_heads"], False: whole["num_key_value_heads"]}
    writer.add_head_count_kv([counts[slide] for slide in slides])
    writer.add_key_length(whole["head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(slides)
    writer.add_shared_kv_layers(0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["top_k_experts"])
    if config["final_logit_softcapping"] is not None:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
