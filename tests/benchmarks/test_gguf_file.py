"""The GGUF file that llama.cpp is measured with holds the checkpoint, in the shape llama.cpp wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import gguf_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import moe_local
from support.gguf_files import load_weights, values, written

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


def test_holds_every_weight_exactly(
    tiny_checkpoint: Path, tiny_weights: dict[str, Any], tmp_path: Path
) -> None:
    tensors = written(tiny_checkpoint, tmp_path / "m.gguf", "F32")
    assert sum(t.n_elements for t in tensors.values()) == sum(w.numel() for w in tiny_weights.values())
    for layer in range(3):
        source = f"model.layers.{layer}"
        for name, matrix in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            stack = values(tensors[f"blk.{layer}.ffn_{name}_exps.weight"])
            for e in range(8):
                expert = f"{source}.block_sparse_moe.experts.{e}.{matrix}.weight"
                assert torch.equal(stack[e], tiny_weights[expert])
        for name, theirs in (
            ("ffn_gate_inp", "block_sparse_moe.gate"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            found = values(tensors[f"blk.{layer}.{name}.weight"])
            assert torch.equal(found, tiny_weights[f"{source}.{theirs}.weight"])
    assert torch.equal(values(tensors["token_embd.weight"]), tiny_weights["model.embed_tokens.weight"])
    assert torch.equal(values(tensors["output.weight"]), tiny_weights["lm_head.weight"])
    assert torch.equal(values(tensors["output_norm.weight"]), tiny_weights["model.norm.weight"])


def test_heads_rotated_in_pairs_score_as_those_rotated_in_halves(
    tiny_checkpoint: Path, tiny_weights: dict[str, Any], tmp_path: Path
) -> None:
    """llama.cpp turns neighbouring rows, transformers the halves of a head: the scores must be the same."""
    tensors = written(tiny_checkpoint, tmp_path / "m.gguf", "F32")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(8) / 8)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [5, 1, 8], for heads of 16

    def halves(weight: torch.Tensor) -> torch.Tensor:
        a, b = (x @ weight.T).view(5, -1, 2, 8).unbind(2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def pairs(weight: torch.Tensor) -> torch.Tensor:
        a, b = (x @ weight.T).view(5, -1, 8, 2).unbind(3)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, dim=1))

    layer = "model.layers.1.self_attn"
    theirs = scores(
        halves(tiny_weights[f"{layer}.q_proj.weight"]), halves(tiny_weights[f"{layer}.k_proj.weight"])
    )
    q, k = (values(tensors[f"blk.1.attn_{name}.weight"]) for name in "qk")
    torch.testing.assert_close(scores(pairs(q), pairs(k)), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores(halves(q), halves(k)), theirs, rtol=1e-2, atol=1e-2)


def test_q4_0_of_all_matrices_and_nothing_else(
    tiny_checkpoint: Path, tiny_weights: dict[str, Any], tmp_path: Path
) -> None:
    tensors = written(tiny_checkpoint, tmp_path / "m.gguf", "Q4_0")
    for name, tensor in tensors.items():
        exact = "norm" in name or "ffn_gate_inp" in name
        assert tensor.tensor_type.name == ("F32" if exact else "Q4_0"), name
        if not exact:
            assert 8 * tensor.n_bytes == 4.5 * tensor.n_elements
    up = values(tensors["blk.2.ffn_up_exps.weight"])[7]
    source = tiny_weights["model.layers.2.block_sparse_moe.experts.7.w3.weight"]
    assert 0.02 < (up - source).norm() / source.norm() < 0.12


def test_random_weights_have_the_same_shapes_and_keep_the_scale(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    true = written(tiny_checkpoint, tmp_path / "true.gguf", "Q4_0")
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    kind = gguf.GGMLQuantizationType.Q4_0
    gguf_file.write(tmp_path, tmp_path / "m.gguf", kind, random=True)
    made = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {n: (list(t.shape), t.tensor_type) for n, t in made.items()} == {
        n: (list(t.shape), t.tensor_type) for n, t in true.items()
    }
    assert torch.equal(values(made["output_norm.weight"]), torch.ones(64))
    down = values(made["blk.1.ffn_down_exps.weight"])
    assert down.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert abs(down.mean().item()) < 0.02 * down.std().item()  # although 0 is not the middle of the levels


def test_describes_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    written(tiny_checkpoint, tmp_path / "m.gguf", "Q4_0")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {key: fields[f"llama.{key}"].contents() for key in ("expert_count", "expert_used_count")}
    assert found == {"expert_count": 8, "expert_used_count": 2}
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["llama.rope.freq_base"].contents() == 1e6
    assert fields["llama.rope.dimension_count"].contents() == 16
    assert fields["llama.vocab_size"].contents() == 512


def test_qwen3_moe(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3_moe")
    weights = load_weights(checkpoint)
    tensors = written(checkpoint, tmp_path / "m.gguf", "F32")
    assert sum(t.n_elements for t in tensors.values()) == sum(w.numel() for w in weights.values())
    source = "model.layers.1"
    for name, theirs in (
        ("attn_q", "self_attn.q_proj"),  # turned by halves on either side: as it is
        ("attn_k", "self_attn.k_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_gate_inp", "mlp.gate"),
    ):
        assert torch.equal(values(tensors[f"blk.1.{name}.weight"]), weights[f"{source}.{theirs}.weight"])
    for name in ("gate", "up", "down"):
        stack = values(tensors[f"blk.1.ffn_{name}_exps.weight"])
        for e, expert in enumerate(stack):
            assert torch.equal(expert, weights[f"{source}.mlp.experts.{e}.{name}_proj.weight"])
    config = json.loads((checkpoint / "config.json").read_text())
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.architecture"].contents() == "qwen3moe"
    assert fields["qwen3moe.attention.key_length"].contents() == config["head_dim"]
    assert fields["qwen3moe.expert_feed_forward_length"].contents() == config["moe_intermediate_size"]
    assert fields["qwen3moe.expert_count"].contents() == len(stack)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}


def check_like(checkpoint: Path, path: Path) -> None:
    """The file gives transformers' greedy ids, and has its weights, as moe-local reads it."""
    hf: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = torch.randint(3, 320, (1, 11), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}
    with moe_local.load(path, experts="fp32", dense="fp32", context=64) as model:
        expected = hf.generate(prompt, do_sample=False, **options)
        assert torch.equal(model.generate(prompt, **options), expected)
        wanted = hf.state_dict()
        for name, weight in model.hf.state_dict().items():  # norms that are stored plus one are rounded
            torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("deepseek_v3", {"rope_parameters": YARN, "first_k_dense_replace": 2}),
        ("glm4_moe_lite", {"v_head_dim": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}),
        ("gpt_oss", {}),
        ("qwen3_5_moe", {"head_dim": 64}),
        ("qwen3_next", {}),
    ],
)
def test_our_own_reader_finds_the_model(
    make_checkpoint: Callable[..., Path], tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(kind, **config)
    written(checkpoint, tmp_path / "m.gguf", "F32")
    check_like(checkpoint, tmp_path / "m.gguf")


def test_describes_latent_attention(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("deepseek_v3", rope_parameters=YARN, v_head_dim=32)
    tensors = written(checkpoint, tmp_path / "m.gguf", "F32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert {
        key: fields[f"deepseek2.{key}"].contents()
        for key in (
            *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
            *("attention.key_length_mla", "attention.value_length_mla", "rope.dimension_count"),
            *("leading_dense_block_count", "expert_shared_count", "expert_gating_func"),
            *("expert_group_count", "expert_group_used_count", "rope.scaling.yarn_log_multiplier"),
        )
    } == {
        "attention.head_count_kv": 1,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "attention.key_length_mla": 32,
        "attention.value_length_mla": 32,
        "rope.dimension_count": 16,
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.0707),
    }
    assert tensors["blk.0.attn_k_b.weight"].shape.tolist() == [16, 32, 4]  # the innermost comes first
    assert tensors["blk.0.attn_v_b.weight"].shape.tolist() == [32, 32, 4]
    assert "blk.0.ffn_gate.weight" in tensors
    assert "blk.1.ffn_gate.weight" not in tensors


def test_published_mxfp4_experts_of_gpt_oss_are_kept(
    publish: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    quantized, twin = publish("gpt_oss")
    weights = load_weights(twin)
    tensors = written(quantized, tmp_path / "m.gguf", "Q8_0")
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert all((types[name] == "MXFP4") == name.endswith("exps.weight") for name in types)
    assert types["blk.0.attn_q.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_q.bias"] == types["blk.0.attn_sinks.weight"] == "F32"
    both, down = (weights[f"model.layers.1.mlp.experts.{name}_proj"].mT for name in ("gate_up", "down"))
    for name, expected in (("gate", both[:, ::2]), ("up", both[:, 1::2]), ("down", down)):
        assert torch.equal(values(tensors[f"blk.1.ffn_{name}_exps.weight"]), expected)
    written(quantized, tmp_path / "exact.gguf", "F32")
    check_like(twin, tmp_path / "exact.gguf")


def test_experts_of_gpt_oss_are_quantized_to_mxfp4(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("gpt_oss", dtype=torch.bfloat16)
    tensors = written(checkpoint, tmp_path / "m.gguf", "Q4_0")
    assert tensors["blk.2.ffn_up_exps.weight"].tensor_type.name == "MXFP4"
    up = values(tensors["blk.2.ffn_up_exps.weight"])
    source = load_weights(checkpoint)["model.layers.2.mlp.experts.gate_up_proj"][:, :, 1::2].mT
    assert 0.02 < (up - source).norm() / source.norm() < 0.2
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["gpt-oss.attention.sliding_window"].contents() == 128
    assert fields["gpt-oss.rope.scaling.factor"].contents() == 32
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_MXFP4_MOE


def test_packed_experts_of_qwen3_5_are_those_saved_one_by_one(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("qwen3_5_moe", head_dim=64)
    weights = load_weights(checkpoint)
    for layer in range(4):
        module = f"model.language_model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([weights.pop(f"{module}.{e}.{name}_proj.weight") for e in range(8)])
            for name in ("gate", "up", "down")
        )
        weights |= {f"{module}.gate_up_proj": torch.cat([gate, up], dim=1), f"{module}.down_proj": down}
    packed = tmp_path / "packed"
    packed.mkdir()
    save_file(weights, packed / "model.safetensors")
    (packed / "config.json").write_text((checkpoint / "config.json").read_text())
    written(checkpoint, tmp_path / "one_by_one.gguf", "F32")
    written(packed, tmp_path / "packed.gguf", "F32")
    assert (tmp_path / "packed.gguf").read_bytes() == (tmp_path / "one_by_one.gguf").read_bytes()


WIDTHS = {"qk_nope_head_dim": 32, "v_head_dim": 32}
"""Blocks have 32 numbers."""


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("deepseek_v3", WIDTHS),
        ("glm4_moe_lite", WIDTHS),
        ("gpt_oss", {}),
        ("qwen3_5_moe", {"head_dim": 64, "linear_num_value_heads": 8}),
        ("qwen3_next", {"linear_num_value_heads": 8}),
        ("nemotron_h", {"n_groups": 2, "mamba_num_heads": 8}),
    ],
)
@pytest.mark.parametrize("matrices", ["Q4_0", "Q8_0"])
def test_random_weights_need_only_a_config(
    make_checkpoint: Callable[..., Path], tmp_path: Path, kind: str, config: dict[str, Any], matrices: str
) -> None:
    checkpoint = make_checkpoint(kind, **config)
    true = written(checkpoint, tmp_path / "true.gguf", matrices)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    gguf_file.write(tmp_path, tmp_path / "m.gguf", gguf.GGMLQuantizationType[matrices], random=True)
    made = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {n: (list(t.shape), t.tensor_type) for n, t in made.items()} == {
        n: (list(t.shape), t.tensor_type) for n, t in true.items()
    }
    for name, tensor in made.items():
        numbers = values(tensor)
        if numbers.dim() == 1 or name.endswith((".bias", "ssm_a", "ssm_d", "ssm_norm.weight")):
            expected = -1.0 if name.endswith("ssm_a") else float("norm" in name or name.endswith("ssm_d"))
            assert torch.equal(numbers, torch.full_like(numbers, expected)), name
        else:
            assert numbers.std().item() == pytest.approx(numbers.shape[-1] ** -0.5, rel=0.15), name


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("glm4_moe_lite", {"rope_interleave": False}, "only if it rotates pairs"),
        ("deepseek_v3", {"num_hidden_layers": 27}, "for DeepSeek-V2-Lite"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse", "dense"]}, "before those with experts"),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "of type 'linear'"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "sliding window in layers 0, 2"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit 7"),
        ("qwen3_5_moe", {}, "as wide as mrope's sections"),
        ("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}, "of the kind mlp"),
        ("nemotron_h", {"use_conv_bias": False}, "with a bias of the convolution"),
        ("nemotron_h", {"mlp_bias": True}, "and no others"),
        ("nemotron_h", {"moe_latent_size": 32}, "not of latents"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "activation relu2"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    config = json.loads((make_checkpoint(kind) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        gguf_file.write(tmp_path, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_0, random=True)
    assert not (tmp_path / "m.gguf").exists()


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="only mixtral, qwen3_moe, "):
        gguf_file.write(tmp_path, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_0)
