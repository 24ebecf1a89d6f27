"""`moe-local verify`: what it finds, says and mends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_local.cli import verify
from moe_local.offload.expert_file.expert_file import ExpertFile, read_manifest
from moe_local.offload.expert_file.verify import find_damage


@pytest.fixture
def model(home, tiny_mixtral, tmp_path):
    """A folder with a checkpoint that may be changed."""
    return shutil.copytree(tiny_mixtral, tmp_path / "mine")


def convert(invoke, model, format="nf4", *flags):
    result = invoke("convert", str(model), "--experts", format, "--json", *flags)
    assert result.exit_code == 0, result.stderr
    return Path(json.loads(result.stdout)["folder"])


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def damage(folder: Path, *experts: tuple[int, int]) -> None:
    file = read_manifest(folder)
    for layer, expert in experts:
        path, offset, nbytes = file.location(layer, expert)
        flip(path, offset + nbytes // 3)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_whole_in_all_formats(invoke, model):
    folders = [convert(invoke, model, format) for format in ("bf16", "nf4")]
    result = invoke("verify", str(model))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (
        f"{model} in bf16, 864 KiB: all 24 experts are whole: {folders[0]}\n"
        f"{model} in nf4, 288 KiB: all 24 experts are whole: {folders[1]}\n"
    )
    one = json.loads(invoke("verify", str(model), "--experts", "nf4", "--json").stdout)
    assert [(report["folder"], report["ok"]) for report in one["reports"]] == [(str(folders[1]), True)]


def test_every_damaged_expert_of_every_file_is_named(invoke, model):
    folders = [convert(invoke, model, format) for format in ("bf16", "nf4")]
    damage(folders[0], (0, 7), (2, 1))
    damage(folders[1], (1, 3))
    result = invoke("verify", str(model))
    assert result.exit_code == 1
    name = "model.layers.{0}.mlp.experts): wrong checksum in layer-0000{0}.safetensors\n"
    assert result.stdout == (
        f"{model} in bf16, 864 KiB: 2 of 24 experts are damaged: {folders[0]}\n"
        f"  expert 7 of MoE layer 0 ({name.format(0)}"
        f"  expert 1 of MoE layer 2 ({name.format(2)}"
        f"{model} in nf4, 288 KiB: 1 of 24 experts is damaged: {folders[1]}\n"
        f"  expert 3 of MoE layer 1 ({name.format(1)}"
    )
    assert result.stderr == (
        f"moe-local: {model}: 2 of 24 experts are damaged in {folders[0]}; check the disk, then repair it: "
        f"moe-local verify {model} --repair\n"
    )
    document = json.loads(invoke("verify", str(model), "--json").stdout)
    assert document["ok"] is False
    assert [(d["layer"], d["expert"]) for d in document["reports"][0]["damaged"]] == [(0, 7), (2, 1)]


def test_repair(invoke, model):
    folder = convert(invoke, model)
    whole = contents(folder)
    damage(folder, (0, 7), (2, 1))
    flip(folder / "layer-00001.safetensors", 300)  # a header
    (model / "model.safetensors").rename(model / "away")
    assert invoke("verify", str(model), "--repair").exit_code == 1  # no source, no repair
    (model / "away").rename(model / "model.safetensors")
    result = invoke("verify", str(model), "--repair", "--json")
    assert result.exit_code == 0, result.stderr
    (report,) = json.loads(result.stdout)["reports"]
    assert (report["ok"], report["repaired"], len(report["damaged"])) == (True, True, 3)
    assert contents(folder) == whole
    assert "all 24 experts are whole" in invoke("verify", str(model), "--repair").stdout


def test_a_damaged_manifest(invoke, model):
    folder = convert(invoke, model)
    whole = contents(folder)
    flip(folder / "manifest.json", 50)
    result = invoke("verify", str(model), "--out", str(folder))
    assert result.exit_code == 1
    assert "the manifest is damaged" in result.stderr
    result = invoke("verify", str(model), "--out", str(folder), "--repair")
    assert result.exit_code == 1, "nobody knows in which format"
    assert "manifest.json is damaged" in result.stderr
    result = invoke("verify", str(model), "--repair")
    assert result.exit_code == 0, result.stderr
    assert contents(folder) == whole


def test_another_revision_is_not_mended_from_this_one(invoke, model, make_checkpoint):
    folder = convert(invoke, model)
    damage(folder, (0, 0))
    before = contents(folder)
    shutil.copy(make_checkpoint("mixtral", seed=1) / "model.safetensors", model)
    result = invoke("verify", str(model), "--out", str(folder), "--repair")
    assert result.exit_code == 1
    assert "another checkpoint" in result.stderr
    assert contents(folder) == before


def test_unfinished_is_not_damaged(invoke, model):
    folder = convert(invoke, model)
    (folder / "manifest.json").unlink()
    result = invoke("verify", str(model), "--out", str(folder))
    assert result.exit_code == 0
    assert "not finished" in result.stdout


def test_what_is_not_there(invoke, model):
    assert invoke("verify", "mixtrl").exit_code == 4
    assert invoke("verify", "mixtral-8x7b").exit_code == 4
    assert invoke("verify", str(model), "--experts", "q9").exit_code == 2
    result = invoke("verify", str(model), "--experts", "int8")
    assert result.exit_code == 4
    assert "moe-local convert" in result.stderr


def test_of_a_folder_only_headers_are_known(invoke, model):
    result = invoke("verify", str(model), "--experts", "native")
    assert result.exit_code == 0
    assert "its file is whole (no checksums are known, only headers and sizes were checked" in result.stdout
    with open(model / "model.safetensors", "ab") as file:
        file.write(b"x")
    result = invoke("verify", str(model))  # nothing is converted
    assert result.exit_code == 1
    assert "after its last tensor" in result.stderr


def test_a_download_is_compared_and_fetched_again(invoke, home, hub, mixtral_19):
    hub.add_repo("org/model", mixtral_19)
    folder = Path(json.loads(invoke("pull", "org/model", "--json").stdout)["folder"])
    result = invoke("verify", "org/model")
    assert result.exit_code == 0, result.stderr
    assert "all 19 files are whole (the Hub's sha256 compared)" in result.stdout
    shard = folder / "model-00004-of-00019.safetensors"
    flip(shard.resolve(), shard.stat().st_size - 5)
    result = invoke("verify", "org/model")
    assert result.exit_code == 1
    assert "  model-00004-of-00019.safetensors: wrong sha256" in result.stdout
    sent = hub.sent.copy()
    result = invoke("verify", "org/model", "--experts", "native", "--repair")
    assert result.exit_code == 0, result.stderr
    assert {name for name in hub.sent if hub.sent[name] != sent[name]} == {shard.name}
    assert shard.read_bytes() == (mixtral_19 / shard.name).read_bytes()


def test_the_rate_stands_beside_the_disks(invoke, model, monkeypatch):
    convert(invoke, model)
    monkeypatch.setattr(verify, "RATE_FROM", 1)
    monkeypatch.setattr(verify, "_disk", lambda folder: 2.5e9)
    assert "GB/s (the disk alone: 2.50): " in invoke("verify", str(model)).stdout


def test_a_file_in_use_is_mended_under_its_reader(invoke, model):
    """The loaded model meets the damage, names it, and goes on once it has been mended."""
    import moe_local
    from moe_local.cache.errors import TransferError

    folder = convert(invoke, model, "fp32")
    with moe_local.load(model, experts="fp32", slots=2, context=64) as loaded:
        whole = loaded.generate([5, 6, 7], max_new_tokens=8, eos_token_id=None).token_ids
    file = ExpertFile.open(folder)
    damage(folder, *((layer, expert) for layer in range(3) for expert in range(7)))
    with moe_local.load(model, experts="fp32", slots=2, context=64) as loaded:
        with pytest.raises(TransferError, match=r"^expert \d of MoE layer 0 in .*verify MODEL --repair$"):
            loaded.generate([5, 6, 7], max_new_tokens=8, eos_token_id=None)
        assert invoke("verify", str(model), "--repair").exit_code == 0
        assert loaded.generate([5, 6, 7], max_new_tokens=8, eos_token_id=None).token_ids == whole
    assert not find_damage(file)


def test_a_folder_that_holds_no_experts_is_not_called_damaged(invoke, model, tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        result = invoke("verify", str(model), "--out", str(folder))
        assert result.exit_code == 4
        assert f"there are no converted experts in {folder}; convert them" in result.stderr
