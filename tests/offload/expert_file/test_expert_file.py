"""Expert files on disk: their bytes, their safetensors shards, and all ways in which they can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
import xxhash
from safetensors import safe_open

from moe_local.cache.errors import ExpertFileError
from moe_local.offload.expert_file.convert import FormatChoice, convert_experts
from moe_local.offload.expert_file.expert_file import MANIFEST, ExpertFile
from moe_local.offload.expert_file.expert_shard import ShardPlan, ShardWriter
from moe_local.offload.expert_file.verify import find_damage
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec
from support import random_experts


@pytest.fixture
def source():
    return random_experts.RandomExperts(layers=2, experts=3)


@pytest.fixture
def file(source, tmp_path):
    return convert_experts(source, codec_for("bf16"), tmp_path / "file")


def flip(path, offset):
    with open(path, "r+b") as shard:
        shard.seek(offset)
        byte = shard.read(1)[0]
        shard.seek(offset)
        shard.write(bytes([byte ^ 0x10]))


GOLDEN_HEADER = (
    b'{"__metadata__":{"moe_local_version":"1","fingerprint":"f00d","expert_format":"fp32","layer":"7",'
    b'"layer_name":"model.layers.8.mlp.experts","layouts":"[{\\"format\\": \\"fp32\\", \\"tensors\\": '
    b'[{\\"name\\": \\"w\\", \\"shape\\": [2, 3]}, {\\"name\\": \\"b\\", \\"shape\\": [2]}], '
    b'\\"segments\\": [{\\"name\\": \\"w\\", \\"part\\": \\"values\\", \\"dtype\\": \\"float32\\", '
    b'\\"shape\\": [2, 3], \\"offset\\": 0, \\"nbytes\\": 24}, {\\"name\\": \\"b\\", \\"part\\": '
    b'\\"values\\", \\"dtype\\": \\"float32\\", \\"shape\\": [2], \\"offset\\": 256, \\"nbytes\\": 8}], '
    b'\\"nbytes\\": 4096}]","expert_layouts":"[0, 0]",'
    b'"xxh3_64":"@CHECKSUMS@"},'
    b'"expert.0":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]},'
    b'"expert.1":{"dtype":"U8","shape":[4096],"data_offsets":[4096,8192]}}'
)


def test_golden_bytes_of_a_shard(tmp_path):
    """Every byte of a fixed shard. If this fails, VERSION must rise, or users' files become unreadable."""
    codec = codec_for("fp32")
    layout = codec.layout([TensorSpec("w", (2, 3)), TensorSpec("b", (2,))])
    experts = []
    for expert in range(2):
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        values = torch.arange(8, dtype=torch.float32) + 10 * expert
        codec.encode({"w": values[:6].view(2, 3), "b": values[6:]}, layout, buffer)
        experts.append(bytes(buffer.numpy()))
    plan = ShardPlan("f00d", "fp32", 7, "model.layers.8.mlp.experts", (layout, layout))
    with ShardWriter(plan, tmp_path) as writer:
        for expert in experts:
            writer.add(memoryview(expert))
        writer.finish()
    written = (tmp_path / "layer-00007.safetensors").read_bytes()
    checksums = b" ".join(xxhash.xxh3_64_hexdigest(expert).encode() for expert in experts)
    header = GOLDEN_HEADER.replace(b"@CHECKSUMS@", checksums)
    assert written[:8] == (4096 - 8).to_bytes(8, "little")
    assert written[8:4096] == header.ljust(4088)
    assert written[4096:] == experts[0] + experts[1]
    assert experts[0][:32] == torch.arange(6, dtype=torch.float32).numpy().tobytes() + bytes(8)
    assert xxhash.xxh3_64_hexdigest(written) == "dd351b738d3e9874"


def test_golden_bytes_of_nf4():
    codec = codec_for("nf4")
    layout = codec.layout([TensorSpec("w", (3, 64)), TensorSpec("b", (3,))])
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    weights = torch.arange(-96, 96, dtype=torch.float32).view(3, 64) / 64
    codec.encode({"w": weights, "b": torch.tensor([1.0, 2.0, 3.0])}, layout, buffer)
    assert xxhash.xxh3_64_hexdigest(buffer.numpy()) == "1a435302464bbb57"


def test_shards_are_safetensors(file, source):
    for layer, spec in enumerate(source.spec.layers):
        path = file.location(layer, 0).path
        with safe_open(path, framework="pt") as shard:
            assert list(shard.keys()) == [f"expert.{expert}" for expert in range(3)]
            assert shard.metadata()["fingerprint"] == source.fingerprint
            for expert in range(3):
                stored = shard.get_tensor(f"expert.{expert}")
                assert stored.numpy().tobytes() == file.read(layer, expert)
                decoded = codec_for("bf16").decode(stored, file.layout(layer, expert), torch.bfloat16)
                for name, weights in source.weights(spec, expert).items():
                    assert torch.equal(decoded[name], weights)


def test_locations_are_whole_pages(file):
    for layer in range(file.num_layers):
        raw = file.location(layer, 0).path.read_bytes()
        end = None
        for expert in range(file.num_experts(layer)):
            path, offset, nbytes = file.location(layer, expert)
            assert offset % 4096 == nbytes % 4096 == 0
            assert end in (None, offset)
            end = offset + nbytes
            assert nbytes == file.nbytes(layer, expert) == file.layout(layer, expert).nbytes
            assert xxhash.xxh3_64_intdigest(raw[offset:end]) == file.checksum(layer, expert)
            assert path == file.folder / f"layer-{layer:05d}.safetensors"
        assert end == len(raw)


def test_what_it_says_of_itself(file, source):
    assert (file.num_layers, file.num_experts(0), file.total_experts) == (2, 3, 6)
    assert file.total_bytes == sum(file.nbytes(layer, expert) for layer in range(2) for expert in range(3))
    assert (file.name, file.format, file.model_type) == ("tiny/Random-Experts", "bf16", "mixtral")
    assert file.fingerprint == source.fingerprint


def test_reopened_it_is_the_same(file):
    again = ExpertFile.open(file.folder, fingerprint=file.fingerprint, format="bf16")
    assert again.layers == file.layers
    assert ExpertFile.open(file.folder).layers == file.layers


def test_a_moved_folder_opens(file, tmp_path):
    moved = file.folder.rename(tmp_path / "elsewhere")
    again = ExpertFile.open(moved)
    assert not find_damage(again)
    assert again.location(1, 2).path.parent == moved


@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (1, 1), (1, 2)])
def test_one_flipped_bit_is_found(file, layer, expert):
    location = file.location(layer, expert)
    flip(location.path, location.offset + location.nbytes - 1)
    again = ExpertFile.open(file.folder)  # sizes are right
    with pytest.raises(
        ExpertFileError, match=rf"^expert {expert} of MoE layer {layer} .*verify MODEL --repair$"
    ) as caught:
        again.read(layer, expert)
    assert "\n" not in str(caught.value)
    assert len(again.read(0, 1)) == again.nbytes(0, 1)


def test_a_file_cut_after_opening(file):
    path = file.location(1, 2).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExpertFileError, match="expert 2 of MoE layer 1"):
        file.read(1, 2)
    with pytest.raises(ExpertFileError, match="bytes instead of"):
        file.check_integrity()
    path.unlink()
    with pytest.raises(ExpertFileError, match=r"cannot read .*No such file"):
        file.read(1, 2)


def break_manifest(file, change):
    path = file.folder / MANIFEST
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: "{}", "is damaged"),
        (lambda text: "\x00" * 100, "is damaged"),
        (lambda text: text.replace('"offset": 4096', '"offset": 8192', 1), "is damaged .*wrong checksum"),
        (lambda text: text.replace('"version": 1', '"version": 99', 1), "version 99, .*reads version 1"),
    ],
)
def test_a_bad_manifest(file, change, message):
    break_manifest(file, change)
    with pytest.raises(ExpertFileError, match=message) as caught:
        ExpertFile.open(file.folder)
    assert "\n" not in str(caught.value)
    assert "moe-local convert MODEL" in str(caught.value)


def test_no_manifest(file, tmp_path):
    (file.folder / MANIFEST).unlink()
    for folder in (file.folder, tmp_path / "nowhere"):
        with pytest.raises(ExpertFileError, match=r"no finished conversion; .*moe-local convert MODEL"):
            ExpertFile.open(folder)


def test_another_checkpoint_or_format(file):
    with pytest.raises(ExpertFileError, match=r"another checkpoint .*moe-local convert MODEL"):
        ExpertFile.open(file.folder, fingerprint="f" * 32)
    with pytest.raises(ExpertFileError, match="holds bf16 experts, not nf4"):
        ExpertFile.open(file.folder, format="nf4")


def test_missing_and_truncated_shards(file):
    path = file.location(1, 0).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    with pytest.raises(
        ExpertFileError, match=rf"has {len(whole) - 4096} bytes instead of {len(whole)}; convert"
    ):
        ExpertFile.open(file.folder)
    path.unlink()
    with pytest.raises(ExpertFileError, match=r"layer-00001.safetensors is missing; convert"):
        ExpertFile.open(file.folder)


def test_a_format_for_each_expert(tmp_path):
    """gpt-oss-like experts, odd ones in bf16, the others in NF4: sizes differ within a layer."""
    source = random_experts.RandomExperts(spec=random_experts.random_spec(2, 4, biases=True))
    choice = FormatChoice("nf4+bf16", lambda key: codec_for("bf16" if key.expert % 2 else "nf4"))
    convert_experts(source, choice, tmp_path / "mixed")
    file = ExpertFile.open(tmp_path / "mixed", format="nf4+bf16")
    assert not find_damage(file)
    for layer in source.spec.layers:
        for expert in range(layer.num_experts):
            name = "bf16" if expert % 2 else "nf4"
            layout = file.layout(layer.index, expert)
            assert layout == codec_for(name).layout(layer.tensors)
            buffer = torch.frombuffer(file.read(layer.index, expert), dtype=torch.uint8)
            decoded = codec_for(layout.format).decode(buffer, layout, torch.bfloat16)
            expected = source.weights(layer, expert)
            if name == "nf4":
                buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
                codec_for(name).encode(expected, layout, buffer)
                expected = codec_for(name).decode(buffer, layout, torch.bfloat16)
            assert all(torch.equal(decoded[key], expected[key]) for key in expected)
    assert file.nbytes(0, 0) < file.nbytes(0, 1)
    manifest = json.loads((tmp_path / "mixed" / MANIFEST).read_text())
    assert len(manifest["layouts"]) == 2


def test_layouts_survive_json():
    layout = codec_for("nf4").layout([TensorSpec("w", (100, 64)), TensorSpec("b", (100,))])
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
