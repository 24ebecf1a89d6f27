"""FP8 and MXFP4 checkpoints: what is read from them equals what transformers makes of them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moe_local
from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.checkpoint import Checkpoint, read_config
from moe_local.offload.checkpoint.expert_sources import ExpertSources
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.fp8 import block_size, dequantize_fp8, exponents
from moe_local.offload.quantize.mxfp4 import dequantize_mxfp4

torch.set_num_threads(1)

MODELS = {"deepseek_v3": "fp8", "qwen3_moe": "fp8", "mixtral": "fp8", "gpt_oss": "mxfp4"}
"""And how support/published.py quantizes them."""


def transformers_own(folder: Path, method: str) -> Any:
    """transformers' model of the quantized folder, dequantized by itself, in fp32."""
    settings = FineGrainedFP8Config if method == "fp8" else Mxfp4Config
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings(dequantize=True)
    ).eval()


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v3", "gpt_oss", *(pytest.param(m, marks=pytest.mark.slow) for m in ("mixtral", "qwen3_moe"))],
)
def test_greedy_ids_and_weights_are_those_of_transformers(
    publish: Callable[..., tuple[Path, Path]], model_type: str, check_like: Callable[[Any, Path], None]
) -> None:
    folder, _ = publish(model_type)
    check_like(transformers_own(folder, MODELS[model_type]), folder)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        pytest.param("mixtral", {}, marks=pytest.mark.slow),
        ("mixtral", {"block": 40}),
        ("qwen3_moe", {"block": 128}),
        pytest.param("mixtral", {"scales": torch.bfloat16}, marks=pytest.mark.slow),
        ("deepseek_v3", {"scales": torch.float8_e8m0fnu}),
        ("gpt_oss", {}),
    ],
)
def test_experts_are_those_of_the_twin(
    publish: Callable[..., tuple[Path, Path]], model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """In blocks that end within a matrix, too, with scales of other kinds, in shards that part the two."""
    folder, twin = publish(model_type, **options)
    checkpoint, plain = Checkpoint.open(folder), Checkpoint.open(twin)
    assert checkpoint.spec.layers == plain.spec.layers
    assert checkpoint.spec.dense == plain.spec.dense
    assert checkpoint.fingerprint != plain.fingerprint
    for layer in plain.spec.layers:
        for expert in range(layer.num_experts):
            found, expected = checkpoint.read_expert(layer, expert), plain.read_expert(layer, expert)
            assert list(found) == list(expected)
            for name, weight in found.items():
                assert weight.is_contiguous()
                assert torch.equal(weight, expected[name]), (layer.name, expert, name)
    nf4 = [
        convert_experts(source, codec_for("nf4"), tmp_path / source.name) for source in (checkpoint, plain)
    ]
    assert nf4[0].read(1, 5) == nf4[1].read(1, 5)


def test_one_expert_is_read_and_dequantized_at_a_time(
    publish: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that one expert takes, and no others."""
    folder, _ = publish("gpt_oss")
    checkpoint = Checkpoint.open(folder)
    asked: list[int] = []
    read = checkpoint.shards.read

    def counting(groups: Any, *more: Any) -> Any:
        asked.append(sum(tensor.nbytes for group in groups for tensor in group))
        return read(groups, *more)

    monkeypatch.setattr(checkpoint.shards, "read", counting)
    layer = checkpoint.spec.layers[0]
    checkpoint.read_expert(layer, 3)
    matrices = sum(t.numel for t in layer.tensors if len(t.shape) == 2)
    biases = sum(t.numel for t in layer.tensors if len(t.shape) == 1)
    assert asked == [matrices // 2 + matrices // 32 + 4 * biases]


@pytest.mark.parametrize(
    "dense", ["nf4", *(pytest.param(d, marks=pytest.mark.slow) for d in ("int8", "bf16"))]
)
def test_dense_formats_start_from_the_dequantized_weights(
    publish: Callable[..., tuple[Path, Path]], dense: str
) -> None:
    folder, twin = publish("mixtral")
    models = [
        moe_local.load(path, slots=3, dense=dense, experts="fp32", context=64) for path in (folder, twin)
    ]
    with models[0] as found, models[1] as expected:
        wanted = expected.hf.state_dict()
        for name, weight in found.hf.state_dict().items():
            assert torch.equal(weight, wanted[name]), name
        assert found.tokenizer is not None


# --- what is wrong with a checkpoint


def change(folder: Path, to: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the folder with its two shards changed by `edit`, which gets all tensors."""
    shutil.copytree(folder, to)
    tensors = {key: tensor for path in to.glob("*.safetensors") for key, tensor in load_file(path).items()}
    edit(tensors)
    for path in to.glob("*.safetensors"):
        path.unlink()
    (to / "model.safetensors.index.json").unlink()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
DENSE = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{EXPERT}_scale_inv"),
            f"tensor {EXPERT} in model.safetensors is stored in FP8 and its scales are missing; get the ",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERT}_scale_inv": torch.ones(3, 4)}),
            rf"{EXPERT} \[64, 64\] in model.safetensors and its scales {EXPERT}_scale_inv \[3, 4\] do not go",
        ),
        (
            lambda tensors: tensors.update({EXPERT: torch.ones(64, 8, dtype=torch.int32)}),
            f"tensor {EXPERT} in model.safetensors is stored as I32, a format in which weights are not read",
        ),
        (
            lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:32].clone()}),
            rf"{EXPERT} \[32, 64\]: expert 2 .* config and weights do not match",
        ),
    ],
)
def test_experts_that_cannot_be_read(
    publish: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    edit: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    folder, _ = publish("qwen3_moe")
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(change(folder, tmp_path / "changed", edit))
    assert "\n" not in str(caught.value)


def test_dense_weights_that_cannot_be_read(publish: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Told in our words, not in those of transformers' loader."""
    folder, _ = publish("qwen3_moe")
    changed = change(folder, tmp_path / "changed", lambda tensors: tensors.pop(f"{DENSE}_scale_inv"))
    message = f"tensor {DENSE} in model.safetensors is stored in FP8 and its scales are missing"
    with pytest.raises(CheckpointError, match=message) as caught:
        moe_local.load(changed, slots=3, experts="fp32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "hqq"},
            r"already quantized \(hqq\), and of such formats only fp8, mxfp4, bitsandbytes, .* are read",
        ),
        ({"bits": 4}, r"already quantized \(unknown\)"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size .* is not two numbers"),
    ],
)
def test_unknown_quantizations(
    make_checkpoint: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(make_checkpoint("mixtral"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    for fields in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        (folder / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(CheckpointError, match=message) as caught:
            read_config(folder)
        assert str(caught.value).startswith(f"{folder / 'config.json'}: ")


# --- the formats themselves


@pytest.mark.parametrize("shape", [(576, 200), (128, 256), (192, 130)])
def test_blocks_of_fp8(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, *shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, -(-shape[0] // 128), -(-shape[1] // 128), generator=generator)
    found = dequantize_fp8(q, scale, torch.float32)
    for row in range(0, shape[0], 37):
        for column in range(0, shape[1], 23):
            expected = q.float()[:, row, column] * scale[:, row // 128, column // 128]
            assert torch.equal(found[:, row, column], expected)
    assert torch.equal(dequantize_fp8(q, scale, torch.bfloat16), found.bfloat16())


def test_block_sizes() -> None:
    assert block_size(576, 5) == 128
    assert block_size(192, 2) == 128
    assert block_size(64, 4) == 16
    assert block_size(96, 6, 16) == 16
    assert block_size(100, 1, 16) == 100
    for size, count in ((100, 3), (100, 0)):
        with pytest.raises(ValueError, match="scales for 100 numbers"):
            block_size(size, count)


def test_every_exponent_and_every_pair_of_mxfp4() -> None:
    """Against transformers' own, which computes in another order."""
    assert exponents(torch.arange(255, dtype=torch.uint8)).tolist() == [2.0 ** (s - 127) for s in range(255)]
    q = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    scale = torch.randint(90, 150, (1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = dequantize_mxfp4(q.flatten(2), scale, torch.float32)
    expected = convert_moe_packed_tensors(q, scale, dtype=torch.float32)
    assert torch.equal(found.transpose(1, 2), expected)


def test_every_source_reads_its_own_place(publish: Callable[..., tuple[Path, Path]]) -> None:
    """No two parts of any two experts lie on the same bytes."""
    checkpoint = Checkpoint.open(publish("deepseek_v3")[0])
    sources: ExpertSources = checkpoint._sources
    taken = sorted(
        (part.shard, part.start, part.start + part.nbytes)
        for source in sources._sources.values()
        for weight in source.ordered().values()
        for part in weight.parts
    )
    for (shard, _, end), (other, start, _) in itertools.pairwise(taken):
        assert shard != other or end <= start
    assert len(taken) == 2 * 8 * 3 * 2
