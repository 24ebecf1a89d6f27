"""Opening checkpoints: every expert against transformers' own loading, and every way a folder can be bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_local.cache.errors import CheckpointError, ModelNotFoundError
from moe_local.offload.checkpoint import expert_sources
from moe_local.offload.checkpoint.checkpoint import Checkpoint

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def copy(tiny_mixtral: Path, tmp_path: Path) -> Path:
    """A Mixtral folder of one's own, to be damaged."""
    return shutil.copytree(tiny_mixtral, tmp_path / "mixtral")


@pytest.fixture
def sharded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """The same in several shards."""
    return shutil.copytree(make_checkpoint("mixtral", shards=4), tmp_path / "sharded")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_one_line(error: pytest.ExceptionInfo[BaseException]) -> None:
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "shards", "dtype"),
    [
        ("mixtral", 1, torch.float32),
        ("mixtral", 4, torch.bfloat16),
        ("qwen3_moe", 1, torch.float32),
        ("qwen3_moe", 4, torch.bfloat16),
        ("qwen2_moe", 4, torch.bfloat16),
        ("olmoe", 4, torch.bfloat16),
        ("phimoe", 4, torch.bfloat16),
        ("granitemoe", 4, torch.bfloat16),
        ("gpt_oss", 4, torch.bfloat16),
        ("deepseek_v3", 4, torch.bfloat16),
    ],
)
def test_every_expert_is_the_models(
    make_checkpoint: MakeCheckpoint, model_type: str, shards: int, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(model_type, shards=shards, dtype=dtype)
    checkpoint = Checkpoint.open(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    assert checkpoint.spec.layers
    assert (len(checkpoint.shards.sizes) > 1) == (shards > 1)
    for layer in checkpoint.spec.layers:
        for expert in range(layer.num_experts):
            weights = checkpoint.read_expert(layer, expert)
            assert list(weights) == [tensor.name for tensor in layer.tensors]
            for tensor in layer.tensors:
                wanted = reference[f"{layer.name}.{tensor.name}"][expert]
                wanted = wanted.T if layer.transposed and wanted.dim() == 2 else wanted
                found = weights[tensor.name]
                assert found.dtype == dtype
                assert found.shape == tensor.shape
                assert found.is_contiguous()
                assert torch.equal(found, wanted)


def test_packed_and_single_experts_are_both_met(make_checkpoint: MakeCheckpoint) -> None:
    """The models above must not all be stored in one way, or half of the mapping would go untested."""
    packed = Checkpoint.open(make_checkpoint("gpt_oss")).shards.tensors
    single = Checkpoint.open(make_checkpoint("mixtral")).shards.tensors
    assert packed["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == 8
    assert "model.layers.0.block_sparse_moe.experts.7.w1.weight" in single


@pytest.mark.parametrize(
    ("called", "name"),
    [
        (None, "mixtral"),
        ("Mixtral-8x7B", "mixtral-8x7b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("https://huggingface.co/org/model", "org/model"),
        ("Demo", "demo"),
    ],
)
def test_one_name_however_it_was_called(copy: Path, called: str | None, name: str) -> None:
    assert Checkpoint.open(copy, called).name == name
    assert Checkpoint.open(copy, str(copy)).name == "mixtral"


def test_published_mixtral_layout(mixtral_19: Path) -> None:
    checkpoint = Checkpoint.open(mixtral_19)
    assert len(checkpoint.shards.sizes) == 19
    assert checkpoint.spec.dtype == torch.bfloat16
    layer = checkpoint.spec.layers[2]
    weights = checkpoint.read_expert(layer, 5)
    tensors: dict[str, torch.Tensor] = {}
    for shard in mixtral_19.glob("*.safetensors"):
        tensors |= load_file(shard)
    prefix = "model.layers.2.block_sparse_moe.experts.5"
    gate_up = torch.cat([tensors[f"{prefix}.w1.weight"], tensors[f"{prefix}.w3.weight"]])
    assert torch.equal(weights["gate_up_proj"], gate_up)
    assert torch.equal(weights["down_proj"], tensors[f"{prefix}.w2.weight"])


def test_expert_numbers_come_from_the_keys(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Twelve experts: sorted as text, number 10 would be the third."""
    folder = make_checkpoint("mixtral", num_local_experts=12)
    checkpoint = Checkpoint.open(folder)
    stored = load_file(folder / "model.safetensors")
    layer = checkpoint.spec.layers[1]
    for expert in (2, 10, 11):
        wanted = stored[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(checkpoint.read_expert(layer, expert)["down_proj"], wanted)


def test_reading_from_many_threads(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    jobs = [(layer, expert) for layer in checkpoint.spec.layers for expert in range(8)]
    alone = [checkpoint.read_expert(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: checkpoint.read_expert(*job), jobs * 2))
    for one, other in zip(alone * 2, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shards", [1, 4])
def test_parts_are_read_to_where_they_belong_together(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Gate and up matrices are joined by reading one behind the other, not by a copy of both."""
    checkpoint = Checkpoint.open(make_checkpoint("mixtral", shards=shards))
    jobs = [(layer, expert) for layer in checkpoint.spec.layers for expert in range(8)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", None)
        joined = [checkpoint.read_expert(*job)["gate_up_proj"] for job in jobs]
    monkeypatch.setattr(expert_sources, "_joined", lambda operation, parts: None)
    for one, job in zip(joined, jobs, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, checkpoint.read_expert(*job)["gate_up_proj"])


def test_memory_is_the_one_given(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    layer = checkpoint.spec.layers[0]
    given: list[torch.Tensor] = []

    def memory(nbytes: int) -> torch.Tensor:
        given.append(torch.empty(nbytes, dtype=torch.uint8))
        return given[-1]

    read = checkpoint.read_expert(layer, 3, memory)
    for block, tensor in zip(given, read.values(), strict=True):
        assert block.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert all(torch.equal(read[name], tensor) for name, tensor in checkpoint.read_expert(layer, 3).items())


def test_no_file_stays_open(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    checkpoint.read_expert(checkpoint.spec.layers[0], 0)
    shutil.rmtree(sharded)
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        checkpoint.read_expert(checkpoint.spec.layers[0], 1)
    assert_one_line(error)


def test_a_read_expert_is_its_own_memory(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    layer = checkpoint.spec.layers[0]
    first = checkpoint.read_expert(layer, 0)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in checkpoint.read_expert(layer, 0).values():
        tensor.zero_()
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_layers_for_multi_token_prediction_are_passed_over(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_checkpoint("deepseek_v3"), tmp_path / "mtp")
    more = {"model.layers.3.mlp.experts.0.gate_proj.weight": torch.ones(64, 64)}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(more))
    assert [layer.name for layer in Checkpoint.open(folder).spec.layers] == [
        "model.layers.1.mlp.experts",
        "model.layers.2.mlp.experts",
    ]


class TestFingerprint:
    def test_is_the_same_for_a_copy(self, sharded: Path, tmp_path: Path) -> None:
        copied = shutil.copytree(sharded, tmp_path / "elsewhere")
        (copied / "README.md").write_text("no weights here")
        assert Checkpoint.open(sharded).fingerprint == Checkpoint.open(copied, "name").fingerprint

    def test_differs_for_other_weights_of_the_same_shapes(self, make_checkpoint: MakeCheckpoint) -> None:
        seeds = {Checkpoint.open(make_checkpoint("mixtral", seed=seed)).fingerprint for seed in range(3)}
        assert len(seeds) == 3

    def test_sees_retraining_in_a_large_shard(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        """Larger than what is read whole, changed everywhere by little."""
        folder = shutil.copytree(make_checkpoint("mixtral", intermediate_size=256), tmp_path / "large")
        assert (folder / "model.safetensors").stat().st_size > 2**20
        before = Checkpoint.open(folder)

        def train(tensors: dict[str, torch.Tensor]) -> None:
            for tensor in tensors.values():
                tensor += 1e-3

        fingerprint = before.fingerprint
        edit_tensors(folder / "model.safetensors", train)
        assert Checkpoint.open(folder).fingerprint != fingerprint

    def test_differs_by_dtype(self, make_checkpoint: MakeCheckpoint) -> None:
        single = Checkpoint.open(make_checkpoint("mixtral", dtype=torch.bfloat16)).fingerprint
        assert single != Checkpoint.open(make_checkpoint("mixtral")).fingerprint


class TestBadFolders:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError, match="not a folder") as error:
            Checkpoint.open(tmp_path / "nowhere")
        assert_one_line(error)

    def test_no_config(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            Checkpoint.open(copy)

    @pytest.mark.parametrize(
        ("text", "wrong"),
        [
            ("{", "is not valid JSON"),
            ("", "is not valid JSON"),
            ("[]", "names no model_type"),
            ("{}", "names no model_type"),
        ],
    )
    def test_broken_config(self, copy: Path, text: str, wrong: str) -> None:
        (copy / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json {wrong}; g") as error:
            Checkpoint.open(copy)
        assert_one_line(error)

    def test_invalid_config_value(self, copy: Path) -> None:
        edit_json(copy / "config.json", lambda fields: fields.update(num_attention_heads="many"))
        with pytest.raises(CheckpointError, match="not a valid mixtral config") as error:
            Checkpoint.open(copy)
        assert_one_line(error)

    def test_sizes_that_contradict_each_other(self, copy: Path) -> None:
        edit_json(copy / "config.json", lambda fields: fields.update(num_attention_heads=0, head_dim=None))
        with pytest.raises(CheckpointError, match=r"cannot build|not a valid mixtral config") as error:
            Checkpoint.open(copy)
        assert_one_line(error)

    def test_unknown_model_type(self, copy: Path) -> None:
        edit_json(copy / "config.json", lambda fields: fields.update(model_type="mixtral9"))
        with pytest.raises(CheckpointError, match=r"'mixtral9' is unknown.*pip install -U transformers"):
            Checkpoint.open(copy)

    def test_remote_code_is_never_run(self, copy: Path) -> None:
        (copy / "evil.py").write_text("raise SystemExit('it ran')")
        change = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
        edit_json(copy / "config.json", lambda fields: fields.update(change))
        with pytest.raises(CheckpointError, match="code of its own, which moe-local never runs"):
            Checkpoint.open(copy)

    def test_known_type_with_remote_code_uses_transformers(self, copy: Path) -> None:
        (copy / "evil.py").write_text("raise SystemExit('it ran')")
        edit_json(copy / "config.json", lambda fields: fields.update(auto_map={"AutoConfig": "evil.Config"}))
        assert Checkpoint.open(copy).spec.model_type == "mixtral"

    def test_options_of_how_it_was_run_are_left_out(self, copy: Path) -> None:
        """Else layers would go one by one, or transformers would ask for flash-attn."""
        options = {"output_router_logits": True, "output_hidden_states": True, "output_attentions": True}
        options["attn_implementation"] = options["_attn_implementation"] = "flash_attention_2"
        edit_json(copy / "config.json", lambda fields: fields.update(options))
        config = Checkpoint.open(copy).config
        assert not any(getattr(config, name, False) for name in options if name.startswith("output"))
        assert config._attn_implementation != "flash_attention_2"

    def test_a_name_of_its_own_for_anothers_architecture(
        self, make_checkpoint: MakeCheckpoint, tmp_path: Path
    ) -> None:
        """Kimi K2's."""
        copy = shutil.copytree(make_checkpoint("deepseek_v3"), tmp_path / "kimi")
        edit_json(copy / "config.json", lambda fields: fields.update(model_type="kimi_k2"))
        assert Checkpoint.open(copy).spec.model_type == "deepseek_v3"

    def test_how_many_experts_each_layer_chooses(
        self, make_checkpoint: MakeCheckpoint, tmp_path: Path
    ) -> None:
        """Hunyuan's config has a list."""
        copy = shutil.copytree(make_checkpoint("hunyuan_v1_moe"), tmp_path / "hunyuan")
        edit_json(copy / "config.json", lambda fields: fields.update(moe_topk=[2, 3, 2]))
        assert [layer.top_k for layer in Checkpoint.open(copy).spec.layers] == [2, 3, 2]

    @pytest.mark.parametrize("model_type", ["minimax", "ernie4_5_vl_moe"])
    def test_a_model_type_that_is_not_served(self, copy: Path, model_type: str) -> None:
        (copy / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(
            CheckpointError, match=f"type '{model_type}', whose .*, are not supported"
        ) as error:
            Checkpoint.open(copy)
        assert_one_line(error)

    def test_quantized_by_its_publisher(self, copy: Path) -> None:
        change = {"quantization_config": {"quant_method": "hqq", "nbits": 4}}
        edit_json(copy / "config.json", lambda fields: fields.update(change))
        with pytest.raises(CheckpointError, match=r"already quantized \(hqq\)"):
            Checkpoint.open(copy)

    def test_dense_model(self, make_checkpoint: MakeCheckpoint) -> None:
        with pytest.raises(CheckpointError, match="has no routed experts") as error:
            Checkpoint.open(make_checkpoint("llama"))
        assert_one_line(error)

    def test_pickles_only(self, copy: Path) -> None:
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
            Checkpoint.open(copy)

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="has neither"):
            Checkpoint.open(copy)

    def test_missing_shard(self, sharded: Path) -> None:
        names = sorted(path.name for path in sharded.glob("*.safetensors"))
        (sharded / names[1]).unlink()
        with pytest.raises(
            CheckpointError, match=rf"{names[1]} of {len(names)}.*moe-local pull org/name"
        ) as error:
            Checkpoint.open(sharded, "org/name")
        assert_one_line(error)

    def test_two_missing_shards(self, sharded: Path) -> None:
        names = sorted(path.name for path in sharded.glob("*.safetensors"))
        for name in names[:2]:
            (sharded / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{names[0]} and 1 more of {len(names)}"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("content", ["{", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}', "[]"])
    def test_corrupt_index(self, sharded: Path, content: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"index\.json is corrupt"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("cut", [1, 5000])
    def test_truncated_shard(self, copy: Path, cut: int) -> None:
        path = copy / "model.safetensors"
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.truncate(size - cut)
        with pytest.raises(CheckpointError, match=rf"cut short: {size - cut} bytes of {size}") as error:
            Checkpoint.open(copy)
        assert_one_line(error)

    @pytest.mark.parametrize("size", [0, 4, 200])
    def test_truncated_inside_the_header(self, copy: Path, size: int) -> None:
        with open(copy / "model.safetensors", "r+b") as file:
            file.truncate(size)
        with pytest.raises(CheckpointError, match="inside its header"):
            Checkpoint.open(copy)

    @pytest.mark.parametrize("position", [7, 8, 60])
    def test_corrupt_header(self, copy: Path, position: int) -> None:
        with open(copy / "model.safetensors", "r+b") as file:
            file.seek(position)
            file.write(b"\xff")
        with pytest.raises(CheckpointError, match="corrupt header"):
            Checkpoint.open(copy)

    def test_trailing_bytes(self, copy: Path) -> None:
        with open(copy / "model.safetensors", "ab") as file:
            file.write(b"more")
        with pytest.raises(CheckpointError, match="4 bytes after its last tensor"):
            Checkpoint.open(copy)

    def test_missing_expert_tensor(self, copy: Path) -> None:
        key = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
        edit_tensors(copy / "model.safetensors", lambda tensors: tensors.pop(key))
        with pytest.raises(CheckpointError, match=r"expert 3 of .*experts\.3\.w3\.\S+ is missing") as error:
            Checkpoint.open(copy)
        assert_one_line(error)

    def test_missing_expert(self, copy: Path) -> None:
        def drop(tensors: dict[str, torch.Tensor]) -> None:
            for key in list(tensors):
                if "layers.2.block_sparse_moe.experts.7." in key:
                    del tensors[key]

        edit_tensors(copy / "model.safetensors", drop)
        with pytest.raises(CheckpointError, match=r"expert 7 of .* is missing"):
            Checkpoint.open(copy)

    def test_wrong_shape(self, copy: Path) -> None:
        key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
        edit_tensors(copy / "model.safetensors", lambda tensors: tensors.update({key: torch.ones(64, 95)}))
        with pytest.raises(CheckpointError, match=r"experts\.3\.w2\.weight \[64, 95\].*should be \[64, 96\]"):
            Checkpoint.open(copy)

    def test_parts_that_do_not_go_together(self, copy: Path) -> None:
        key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
        edit_tensors(copy / "model.safetensors", lambda tensors: tensors.update({key: torch.ones(96, 32)}))
        with pytest.raises(CheckpointError, match="parts that do not go together") as error:
            Checkpoint.open(copy)
        assert_one_line(error)

    def test_more_experts_than_the_config_says(self, copy: Path) -> None:
        edit_json(copy / "config.json", lambda fields: fields.update(num_local_experts=6))
        with pytest.raises(CheckpointError, match="speaks of 6 experts"):
            Checkpoint.open(copy)

    def test_more_packed_experts_than_the_config_says(
        self, make_checkpoint: MakeCheckpoint, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(make_checkpoint("gpt_oss"), tmp_path / "packed")
        edit_json(folder / "config.json", lambda fields: fields.update(num_local_experts=4))
        with pytest.raises(CheckpointError, match=r"has shape \[8, .*speaks of 4 experts"):
            Checkpoint.open(folder)

    def test_a_shard_that_shrinks_after_opening(self, copy: Path) -> None:
        checkpoint = Checkpoint.open(copy)
        checkpoint.check_integrity()
        with open(copy / "model.safetensors", "r+b") as file:
            file.truncate(10_000)
        with pytest.raises(CheckpointError, match="now has 10000"):
            checkpoint.check_integrity()
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.read_expert(checkpoint.spec.layers[2], 7)


def test_single_file_wins_over_an_index(copy: Path) -> None:
    """As in transformers, which loads the dense part."""
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')
    assert list(Checkpoint.open(copy).shards.sizes) == ["model.safetensors"]
