"""Nemotron 3 as llama.cpp is measured with it: the checkpoint's weights, and layers of three kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peers import gguf_file

from support.gguf_files import load_weights, values, written

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

GROUPS = {"n_groups": 2, "mamba_num_heads": 8}


def test_holds_nemotrons_layers_of_three_kinds(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("nemotron_h", **GROUPS)
    weights = {k.removeprefix("backbone."): w for k, w in load_weights(checkpoint).items()}
    tensors = written(checkpoint, tmp_path / "m.gguf", "F32")
    found = {name: values(tensor) for name, tensor in tensors.items()}
    assert sum(w.numel() for w in found.values()) == sum(w.numel() for w in weights.values())
    for name, theirs in (
        ("token_embd.weight", "embeddings.weight"),
        ("output_norm.weight", "norm_f.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.0.ssm_in.weight", "layers.0.mixer.in_proj.weight"),
        ("blk.0.ssm_conv1d.bias", "layers.0.mixer.conv1d.bias"),
        ("blk.0.ssm_dt.bias", "layers.0.mixer.dt_bias"),
        ("blk.0.ssm_out.weight", "layers.0.mixer.out_proj.weight"),
        ("blk.1.ffn_gate_inp.weight", "layers.1.mixer.gate.weight"),
        ("blk.1.exp_probs_b.bias", "layers.1.mixer.gate.e_score_correction_bias"),
        ("blk.1.ffn_up_shexp.weight", "layers.1.mixer.shared_experts.up_proj.weight"),
        ("blk.1.ffn_down_shexp.weight", "layers.1.mixer.shared_experts.down_proj.weight"),
        *(
            (f"blk.2.attn_{to}.weight", f"layers.2.mixer.{to[0]}_proj.weight")
            for to in ("q", "k", "v", "output")
        ),
        *((f"blk.{layer}.attn_norm.weight", f"layers.{layer}.norm.weight") for layer in range(4)),
    ):
        assert torch.equal(found[name], weights[theirs]), name
    mixer = "layers.0.mixer"
    assert torch.equal(found["blk.0.ssm_conv1d.weight"], weights[f"{mixer}.conv1d.weight"][:, 0])
    torch.testing.assert_close(found["blk.0.ssm_a"], -weights[f"{mixer}.A_log"].exp()[:, None])
    assert torch.equal(found["blk.0.ssm_d"], weights[f"{mixer}.D"][:, None])
    assert torch.equal(found["blk.0.ssm_norm.weight"], weights[f"{mixer}.norm.weight"].view(2, 64))
    for name in ("up", "down"):
        for e, expert in enumerate(found[f"blk.3.ffn_{name}_exps.weight"]):
            assert torch.equal(expert, weights[f"layers.3.mixer.experts.{e}.{name}_proj.weight"])


@pytest.mark.parametrize("published", [False, True])
def test_describes_nemotrons_layers(
    make_checkpoint: Callable[..., Path], tmp_path: Path, published: bool
) -> None:
    """As transformers writes the config, and as it is published, with letters for the layers."""
    config = json.loads((make_checkpoint("nemotron_h", **GROUPS) / "config.json").read_text())
    if published:
        del config["layers_block_type"]
        config["hybrid_override_pattern"] = "ME*E"
    (tmp_path / "config.json").write_text(json.dumps(config))
    gguf_file.write(tmp_path, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_0, random=True)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    expected = {
        "block_count": 4,
        "attention.head_count_kv": [0, 0, 2, 0],
        "feed_forward_length": [0, 64, 0, 64],
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "expert_weights_norm": True,
        "ssm.inner_size": 128,
        "ssm.time_step_rank": 8,
        "ssm.group_count": 2,
    }
    assert {key: fields[f"nemotron_h_moe.{key}"].contents() for key in expected} == expected
    assert "nemotron_h_moe.rope.freq_base" not in fields
