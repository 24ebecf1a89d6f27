"""bitsandbytes, GPTQ, AWQ and compressed-tensors: what is read equals what their definitions give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_local
from moe_local.cache.errors import CheckpointError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.checkpoint.checkpoint import Checkpoint, read_config
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.native import NativeExperts
from moe_local.offload.kernels.cpu import reads
from moe_local.offload.quantize.codec import codec_for, decoder_for
from moe_local.offload.quantize.nf4 import nf4_matrix
from support import published, published_floats
from support.variants import others_slow

torch.set_num_threads(1)

AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "data_type": "int",
    "extra_config": {
        ".*self_attn.*": {"bits": 8, "group_size": 16},
        "lm_head": {"bits": 16, "data_type": "float"},
        "model.layers.0.mlp.experts.1.down_proj": {"bits": 16},
    },
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nf4": ("mixtral", "bitsandbytes", {}),
    "nf4_flat": ("mixtral", "bitsandbytes", {"nested": False}),
    "fp4_128": ("qwen3_moe", "bitsandbytes", {"kind": "fp4", "block": 128}),
    "gptq": ("qwen2_moe", "gptq", {}),
    "gptq_order": ("mixtral", "gptq", {"act_order": True, "symmetric": False}),
    "gptq_v2": ("mixtral", "gptq", {"v2": True, "symmetric": False, "group": -1}),
    "gptq_8": ("mixtral", "gptq", {"bits": 8, "symmetric": False}),
    "awq": ("mixtral", "awq", {}),
    "gptq_mixed": (
        "qwen2_moe",
        "mixed_gptq",
        {"settings": {"quant_method": "gptq", "dynamic": {"+:.*self_attn.*": {"bits": 8}, "-:.*s.1.*": {}}}},
    ),
    "auto_round": ("qwen3_moe", "mixed_gptq", {"settings": AUTO_ROUND}),
    "auto_round_awq": ("mixtral", "auto_round", {}),
    "packed": ("qwen3_moe", "pack_quantized", {}),
    "packed_zeros": ("qwen3_moe", "pack_quantized", {"symmetric": False}),
    "packed_8": ("mixtral", "pack_quantized", {"bits": 8, "strategy": "channel", "symmetric": False}),
    "packed_order": ("mixtral", "pack_quantized", {"act_order": True}),
    "float": ("qwen3_moe", "float_quantized", {}),
    "float_tensor": ("mixtral", "float_quantized", {"strategy": "tensor"}),
    "ct_nvfp4": ("qwen3_moe", "compressed_tensors", {"kind": "nvfp4"}),
    "ct_mxfp4": ("qwen3_moe", "compressed_tensors", {"kind": "mxfp4"}),
    "ct_mxfp8": ("mixtral", "compressed_tensors", {"kind": "mxfp8"}),
    "ct_int8": ("mixtral", "compressed_tensors", {"kind": "int8"}),
    "ct_int8_zeros": ("qwen3_moe", "compressed_tensors", {"kind": "int8_zeros"}),
    "ct_mixed": ("mixtral", "compressed_tensors", {"kind": "mixed"}),
    "mo_nvfp4": ("qwen3_moe", "modelopt", {"kind": "NVFP4"}),
    "mo_fp8": ("mixtral", "modelopt", {"kind": "FP8"}),
    "mo_rows": ("qwen3_moe", "modelopt", {"kind": "FP8_PER_CHANNEL_PER_TOKEN"}),
    "mo_blocks": ("qwen3_moe", "modelopt", {"kind": "FP8_PB_WO"}),
    "mo_mxfp8": ("qwen3_moe", "modelopt", {"kind": "MXFP8"}),
    "mo_mixed": ("qwen3_moe", "modelopt", {"kind": "MIXED_PRECISION"}),
}

ORDINARY = (
    "nf4",
    "gptq_order",
    "auto_round",
    "awq",
    "packed_zeros",
    "float_tensor",
    "ct_nvfp4",
    "ct_mixed",
    "mo_mixed",
)
"""One of each kind; the others are slow."""

Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made("gptq") -> the quantized folder of a case and its twin, made once."""
    found: dict[str, tuple[Path, Path]] = {}

    def made(case: str) -> tuple[Path, Path]:
        if case not in found:
            model_type, method, options = CASES[case]
            source = make_checkpoint(model_type, tokenizer=True)
            module = published if hasattr(published, method) else published_floats
            found[case] = getattr(module, method)(source, tmp_path_factory.mktemp(case), **options)
        return found[case]

    return made


@pytest.mark.parametrize("case", others_slow(CASES, ORDINARY))
def test_every_weight_is_that_of_the_twin(made: Made, case: str) -> None:
    """Experts and dense ones, to the bit; and nothing else is left over to be taken for a weight."""
    checkpoint, plain = (Checkpoint.open(folder) for folder in made(case))
    assert checkpoint.fingerprint != plain.fingerprint
    for layer in plain.spec.layers:
        for expert in range(layer.num_experts):
            found, expected = checkpoint.read_expert(layer, expert), plain.read_expert(layer, expert)
            assert list(found) == list(expected)
            for name, weight in found.items():
                assert torch.equal(weight, expected[name].float()), (layer.name, expert, name)
    dense = checkpoint.dense_weights()
    assert dense is not None
    biases = {key for key in checkpoint.weights if ".experts." in key and key.endswith(".bias")}
    assert set(checkpoint.weights) - biases == set(plain.weights)
    for key, weight in plain.weights.items():
        (stored,) = plain.shards.read([weight.parts])
        assert torch.equal(dense.read(checkpoint.weights[key]), stored[0]), key


@pytest.mark.parametrize(
    "case",
    ["nf4", "gptq_order", "awq", "packed_zeros", "float"]
    + [
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            "fp4_128",
            "gptq",
            "gptq_v2",
            "auto_round",
            "packed_8",
            "ct_mixed",
            "mo_nvfp4",
            "mo_mixed",
        )
    ],
)
def test_greedy_ids_are_those_of_transformers(
    made: Made, case: str, check_like: Callable[[Any, Path], None]
) -> None:
    """On the twin, whose numbers others have decoded."""
    folder, twin = made(case)
    check_like(AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval(), folder)


@pytest.mark.parametrize("case", ["nf4", "nf4_flat"])
def test_codes_of_nf4_stay_what_they_are(made: Made, case: str, tmp_path: Path) -> None:
    """Encoded again, each weight keeps its level; only scales are rounded, to 8 bits."""
    checkpoint = Checkpoint.open(made(case)[0])
    file = convert_experts(checkpoint, codec_for("nf4"), tmp_path / "nf4")
    for layer in checkpoint.spec.layers:
        for expert in range(layer.num_experts):
            buffer = torch.frombuffer(file.read(layer.index, expert), dtype=torch.uint8)
            layout = file.layout(layer.index, expert)
            for name, pieces in checkpoint.expert_pieces(layer, expert).items():
                stored = checkpoint.shards.read([piece.parts for piece in pieces])
                codes = torch.cat([parts[0].flatten() for parts in stored])
                assert torch.equal(nf4_matrix(buffer, layout, name).q, codes), (layer.name, expert, name)


def test_packed_experts_are_not_read_in_place(made: Made, tmp_path: Path) -> None:
    for case in ("nf4", "gptq", "awq", "packed"):
        folder, _ = made(case)
        with pytest.raises(CheckpointError, match="cannot be read in place"):
            NativeExperts(Checkpoint.open(folder), tmp_path)
        with pytest.raises(CheckpointError, match="cannot be read in place") as caught:
            moe_local.fit(folder, experts="native")
        assert "\n" not in str(caught.value)
        plans = [moe_local.fit(path, ram="4GiB", device="cpu") for path in made(case)]
        assert plans[0].bytes.experts_total == plans[1].bytes.experts_total


@pytest.mark.parametrize(
    "case", ["float", "mo_rows", "mo_blocks", "mo_mxfp8", "ct_mxfp4", "ct_nvfp4", "mo_nvfp4"]
)
def test_scales_in_other_shapes_are_read_in_place(made: Made, tmp_path: Path, case: str) -> None:
    """The slots planned for are as large as what is read, and torch decodes them to the bit."""
    folder, twin = made(case)
    checkpoint = Checkpoint.open(folder)
    layouts = NativeExperts(checkpoint, tmp_path)
    layer = checkpoint.spec.layers[-1]
    layout = layouts.layout(layer.index, 3)
    assert layout.nbytes <= checkpoint.spec.stored.layout(layer.tensors).nbytes
    assert reads(layout)
    buffer = torch.full((layout.nbytes,), 0xA5, dtype=torch.uint8)
    for path, offset, nbytes, at in layouts.locate(ExpertKey(layer.index, 3)).ranges:
        stored = path.read_bytes()[offset : offset + nbytes]
        buffer[at : at + nbytes] = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
    decoded = decoder_for(layout.format).decode(buffer, layout, torch.float32)
    for name, weight in checkpoint.read_expert(layer, 3).items():
        assert torch.equal(decoded[name], weight), name
    prompt = torch.randint(3, 320, (1, 9), generator=torch.Generator().manual_seed(2))
    answers = []
    for path, experts in ((folder, "native"), (twin, "fp32")):
        with moe_local.load(path, slots=3, experts=experts, dense="fp32", context=64) as model:
            answers.append(model.generate(prompt, max_new_tokens=4, eos_token_id=None))
    assert torch.equal(*answers)


# --- what is wrong with a checkpoint

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
MIXTRAL = "model.layers.1.block_sparse_moe.experts.2.w1"


@pytest.mark.parametrize(
    ("case", "end", "replaced", "message"),
    [
        ("nf4", ".weight.absmax", None, r"is packed and .*w1.weight.absmax is missing; get the"),
        ("nf4", ".weight.quant_state.bitsandbytes__nf4", None, r"packed and .*__\* is missing"),
        ("nf4", ".weight.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "makes no sense"),
        ("nf4", ".weight", torch.zeros(3, 1, dtype=torch.uint8), r"which should be of 6 numbers"),
        ("gptq_8", ".scales", None, r"w1.scales is missing"),
        ("gptq_8", ".qzeros", torch.zeros(2, 3, dtype=torch.int32), r"do not go together"),
        ("gptq_order", ".g_idx", None, r"w1.g_idx is missing"),
        (
            "auto_round",
            ".qzeros",
            torch.zeros(2, 3, dtype=torch.int32),
            r"which should be 4 or 8 bits for each",
        ),
        ("auto_round", ".scales", torch.zeros(3, 5), r"do not go together"),
        ("awq", ".qweight", torch.zeros(3, dtype=torch.int32), r"should be a matrix of I32"),
        (
            "awq",
            ".qweight",
            torch.zeros(40, 8, dtype=torch.int32),
            r"40 inputs, which group_size 32 does not",
        ),
        ("packed_8", ".weight_scale", None, r"w1.weight_scale is missing"),
        ("packed_8", ".weight_zero_point", None, r"w1.weight_zero_point is missing"),
        ("ct_nvfp4", ".weight_global_scale", None, r"weight_packed .* in NVFP4 and its second scale is miss"),
        ("mo_nvfp4", ".weight_scale_2", torch.ones(2), r"weight_scale_2 \[2\] do not go together"),
        ("mo_nvfp4", ".weight_scale", None, r"stored as U8, a format in which weights are not read"),
        ("mo_nvfp4", ".weight_scale", torch.ones(3, 5).to(torch.float8_e4m3fn), r"\[3, 5\] do not go toget"),
        ("mo_nvfp4", ".pre_quant_scale", torch.ones(4), r"changes a layer's input .*; use the model's bf16"),
        ("mo_rows", ".weight_scale", torch.ones(3), r"weight_scale \[3\] do not go together"),
        ("ct_int8", ".weight_scale", torch.ones(3, 1), r"weight_scale \[3, 1\] do not go together"),
        ("ct_int8_zeros", ".weight_zero_point", torch.ones(1), r"weight_zero_point \[1\] do not go togeth"),
    ],
)
def test_experts_that_cannot_be_read(
    made: Made, tmp_path: Path, case: str, end: str, replaced: torch.Tensor | None, message: str
) -> None:
    key = _found(made(case)[0], ".weight_scale" if end == ".pre_quant_scale" else end)
    if end == ".pre_quant_scale":
        key = key.removesuffix(".weight_scale") + end
    folder = _changed(made(case)[0], tmp_path / "changed", key, replaced)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


def test_a_description_beside_the_config(made: Made, tmp_path: Path) -> None:
    """Earlier releases of Model Optimizer leave config.json as it was."""
    folder = shutil.copytree(made("mo_nvfp4")[0], tmp_path / "earlier")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (folder / "hf_quant_config.json").write_text(json.dumps(described))
    layer = Checkpoint.open(folder).spec.layers[0]
    found, expected = (Checkpoint.open(path).read_expert(layer, 0) for path in (folder, made("mo_nvfp4")[1]))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())

    (folder / "hf_quant_config.json").write_text('{"quantization": ["NVFP4"]}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json does not describe .*; get the"):
        Checkpoint.open(folder)


def test_inputs_of_no_group(made: Made, tmp_path: Path) -> None:
    folder, _ = made("gptq_order")
    key = _found(folder, ".g_idx")
    wrong = torch.full_like(load_all(folder)[key], 7)
    checkpoint = Checkpoint.open(_changed(folder, tmp_path / "changed", key, wrong))
    with pytest.raises(CheckpointError, match="inputs are of groups up to 7, of ") as caught:
        checkpoint.read_expert(checkpoint.spec.layers[1], 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_8bit": True}, "bitsandbytes with load_in_4bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "of which only uint8 is read"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits '3', of which only 4 or 8 is read"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size '0'"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin', of which only gptq or gptq_v2",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {".*down.*": {"bits": 3}}},
            "gptq with dynamic of bits '3', of which only 4 or 8 is read",
        ),
        (AUTO_ROUND | {"bits": 2, "group_size": 32}, "auto-round with bits '2'"),
        (
            AUTO_ROUND | {"bits": 4, "group_size": 32, "data_type": "mx_fp"},
            "data_type 'mx_fp', of which only int",
        ),
        (
            AUTO_ROUND | {"bits": 4, "group_size": 32, "extra_config": {"a": {"bits": 2}}},
            "extra_config of bits '2'",
        ),
        (
            AUTO_ROUND | {"bits": 4, "group_size": 32, "packing_format": "auto_round:llm_compressor"},
            "packing_format 'auto_round:llm_compressor', of which only auto_round:auto_gptq",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "marlin"}, "version 'marlin'"),
        ({"quant_method": "awq", "bits": 8, "group_size": 64}, "bits '8'"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mxfp6-pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 6}}},
            },
            "format 'mxfp6-pack-quantized', of which only pack-quantized or",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": {}}}},
            "transform_config .* of which only none is read",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config .* of which only none is read",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo 'NVFP4_AWQ', of which only"),
        ({"quant_method": "modelopt"}, "quant_algo 'NONE', of which only FP8 or"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "MXFP8"}},
            },
            "of which only layers with the same blocks in FP8",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": "FP8"}},
            "of which only a description of each layer",
        ),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "nothing of weights"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    name: {"weights": {"num_bits": bits, "strategy": "channel"}}
                    for name, bits in (("a", 4), ("b", 8))
                },
            },
            "of which only groups with the same bits",
        ),
    ],
)
def test_settings_that_are_not_read(
    make_checkpoint: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(make_checkpoint("mixtral"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(folder)
    assert "\n" not in str(caught.value)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def _found(folder: Path, end: str) -> str:
    """The key of one expert's part, by the name that the checkpoint has for experts."""
    keys = load_all(folder)
    return next(key for key in (EXPERT + end, MIXTRAL + end) if key in keys)


def _changed(folder: Path, to: Path, key: str, tensor: torch.Tensor | None) -> Path:
    """A copy of the folder in one file, without this tensor or with another in its place."""
    shutil.copytree(folder, to)
    tensors = load_all(to)
    tensors.pop(key, None)
    if tensor is not None:
        tensors[key] = tensor
    for path in to.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to
