"""What users get wrong and what disks do: one clear line of the right kind each, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_local
from moe_local.cache.errors import (
    CheckpointError,
    DoesNotFitError,
    ExpertFileError,
    ModelNotFoundError,
    MoeLocalError,
    OptionError,
)
from moe_local.offload.expert_file import expert_shard
from moe_local.offload.expert_file.expert_file import MANIFEST
from moe_local.offload.expert_file.usage import read_usage
from support import tiny_models

torch.set_num_threads(1)

EXACT = {"experts": "fp32", "dense": "fp32"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def copy(tiny_mixtral: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Mixtral, in one shard, to damage."""
    return Path(shutil.copytree(tiny_mixtral, tmp_path / "copy"))


@pytest.fixture
def published(mixtral_19: Path, tmp_path: Path) -> Path:
    """A copy of the small Mixtral in 19 shards, to damage."""
    return Path(shutil.copytree(mixtral_19, tmp_path / "published"))


def refused(call: Callable[[], object], kind: type[MoeLocalError], *words: str) -> str:
    """The one line with which `call` is refused; it has all of `words`, and none of a temporary nature."""
    with pytest.raises(MoeLocalError) as caught:
        call()
    line = str(caught.value)
    assert type(caught.value) is kind, line
    assert "\n" not in line
    assert len(line) < 500
    for word in words:
        assert word in line
    return line


def temporary_files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.suffix in (".tmp", ".partial")]


def greedy(model: moe_local.Model) -> list[int]:
    return model.generate([5, 6, 7], max_new_tokens=4, eos_token_id=None).token_ids


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtral-8x7", ["model 'mixtral-8x7' not found", "did you mean mixtral-8x7b"]),
        ("qwen3-30b", ["did you mean qwen3-30b-a3b"]),
        ("no-such-model", ["model 'no-such-model' not found", "known names: demo, mixtral-8x7b"]),
        ("/no/such/folder", ["/no/such/folder"]),
        ("", ["not found"]),
    ],
)
def test_unknown_models(name: str, words: list[str], home: Path) -> None:
    for call in (moe_local.load, moe_local.convert, moe_local.fit):
        refused(lambda call=call: call(name), ModelNotFoundError, *words)
    assert ModelNotFoundError.exit_code == 4
    assert not home.exists()


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    refused(lambda: moe_local.load(tmp_path), CheckpointError, "has no config.json")


def test_a_dense_model(make_checkpoint: Callable[..., Path]) -> None:
    for call in (moe_local.load, moe_local.convert, moe_local.fit):
        refused(
            lambda call=call: call(make_checkpoint("llama")),
            CheckpointError,
            "LlamaForCausalLM",
            "has no routed experts to offload",
        )


# --- damaged checkpoints


def test_a_missing_shard(published: Path, home: Path) -> None:
    (published / "model-00007-of-00019.safetensors").unlink()
    for call in (moe_local.load, moe_local.convert):
        refused(
            lambda call=call: call(published), CheckpointError, "model-00007-of-00019.safetensors", "missing"
        )
    assert not home.exists()


def test_truncated_and_corrupt_shards(published: Path, home: Path) -> None:
    shard = published / "model-00007-of-00019.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(lambda: moe_local.load(published), CheckpointError, shard.name, "cut short")
    shard.write_bytes(whole[:4])
    refused(lambda: moe_local.load(published), CheckpointError, shard.name, "cut short")
    shard.write_bytes(b"\xff" * len(whole))
    refused(lambda: moe_local.load(published), CheckpointError, shard.name, "corrupt header")
    shard.write_bytes(whole[:8] + b"}" + whole[9:])
    refused(lambda: moe_local.load(published), CheckpointError, shard.name, "corrupt header")
    shard.write_bytes(b"")
    refused(lambda: moe_local.load(published), CheckpointError, shard.name)
    (published / "model.safetensors.index.json").write_text("{")
    refused(lambda: moe_local.load(published), CheckpointError, "model.safetensors.index.json", "corrupt")
    assert not home.exists()


def test_a_config_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for field, value in (("num_local_experts", 16), ("intermediate_size", 128), ("num_hidden_layers", 4)):
        (copy / "config.json").write_text(json.dumps({**config, field: value}))
        refused(lambda: moe_local.load(copy), CheckpointError)
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    refused(lambda: moe_local.load(copy), CheckpointError)
    (copy / "config.json").write_text("not json")
    refused(lambda: moe_local.load(copy), CheckpointError, "config.json", "is not valid JSON; get")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights of a checkpoint of one shard in place."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def expert_key(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in weights if "layers.1" in name and "experts" in name)


@pytest.mark.parametrize("experts", ["nf4", "fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_an_expert(copy: Path, home: Path, experts: str, value: float) -> None:
    """Found at conversion, before anything is computed with it; the layers before it are kept."""
    rewrite(copy, lambda weights: weights[expert_key(weights)].view(-1)[5].fill_(value))
    refused(lambda: moe_local.load(copy, experts=experts), CheckpointError, "layers.1", "expert 0", "1 of")
    assert not temporary_files(home)
    rewrite(copy, lambda weights: weights[expert_key(weights)].view(-1)[5].fill_(0.0))
    moe_local.load(copy, experts=experts).close()


def test_nan_in_the_dense_part(copy: Path) -> None:
    rewrite(copy, lambda weights: weights["model.norm.weight"][3].fill_(float("nan")))
    with moe_local.load(copy, slots=2, context=64) as model:
        for call in (lambda: greedy(model), lambda: model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)):
            refused(call, MoeLocalError, "NaN")
        model.check_integrity()


def test_a_missing_dense_weight(copy: Path) -> None:
    rewrite(copy, lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"))
    refused(lambda: moe_local.load(copy), CheckpointError, "model.layers.1.self_attn.q_proj.weight")


# --- budgets and options


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"ram": "lots"}, OptionError, ["ram", "'lots'", "20GiB"]),
        ({"ram": "-1GiB"}, OptionError, ["ram", "-1GiB"]),
        ({"ram": -5}, OptionError, ["ram", "-5"]),
        ({"ram": 0}, OptionError, ["ram"]),
        ({"ram": True}, OptionError, ["ram"]),
        ({"ram": 1.5}, OptionError, ["ram"]),
        ({"ram": "1B"}, DoesNotFitError, ["does not fit", "more than the 1 B"]),
        ({"ram": "1MiB"}, DoesNotFitError, ["does not fit", "RAM", "fits"]),
        ({"ram": "nan"}, OptionError, ["ram"]),
        ({"ram": "99999999999999999999GiB"}, OptionError, ["ram"]),
        ({"vram": "8GiB", "device": "cpu"}, OptionError, ["vram", "cpu", "set ram"]),
        ({"slots": 1}, OptionError, ["slots 1 is below the 2 experts", "use 2 to 8"]),
        ({"slots": 0}, OptionError, ["slots 0"]),
        ({"slots": "many"}, OptionError, ["slots 'many'"]),
        ({"slots": 2.5}, OptionError, ["slots 2.5"]),
        ({"context": 4097}, OptionError, ["context 4097 is beyond the 4096 tokens"]),
        ({"context": 0}, OptionError, ["context 0"]),
        ({"experts": "nf5"}, OptionError, ["unknown experts 'nf5'", "nf4"]),
        ({"dense": "fp64"}, OptionError, ["unknown dense 'fp64'", "fp32"]),
        ({"policy": "belady"}, OptionError, ["unknown policy 'belady'", "lru"]),
        ({"prefetch": "yes"}, OptionError, ["unknown prefetch 'yes'", "router"]),
        ({"miss": "skip"}, OptionError, ["unknown miss 'skip'", "fetch"]),
        ({"activations": "fp8"}, OptionError, ["unknown activations 'fp8'"]),
        ({"device": "tpu"}, OptionError, ["unknown device 'tpu'"]),
    ],
    ids=str,
)
def test_bad_budgets_and_options(
    tiny_mixtral: Path, home: Path, options: dict[str, Any], kind: type[MoeLocalError], words: list[str]
) -> None:
    refused(lambda: moe_local.load(tiny_mixtral, **options), kind, *words)
    assert kind.exit_code == (3 if kind is DoesNotFitError else 2)
    assert not home.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there(tiny_mixtral: Path) -> None:
    refused(lambda: moe_local.load(tiny_mixtral, device="cuda:1"), OptionError, "cuda:1", "device='cpu'")
    refused(lambda: moe_local.load(tiny_mixtral, vram="8GiB"), OptionError, "vram", "set ram")


def test_more_slots_than_experts_are_all_of_them(tiny_mixtral: Path) -> None:
    with moe_local.load(tiny_mixtral, slots=1000, context=64) as model:
        assert model.plan.ram_slots == (8, 8, 8)


def test_a_folder_without_a_tokenizer(make_checkpoint: Callable[..., Path]) -> None:
    with moe_local.load(make_checkpoint("mixtral"), slots=2, context=64) as model:
        assert model.tokenizer is None
        out = model.generate([5, 6, 7], max_new_tokens=3, eos_token_id=None)
        assert out.text == ""
        assert len(out.token_ids) == 3
        assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] <= 4
        for prompt in ("hello", [{"role": "user", "content": "hello"}]):
            refused(
                lambda prompt=prompt: model.generate(prompt), OptionError, "has no tokenizer", "token ids"
            )
        refused(lambda: model.generate([5], stop="x"), OptionError, "tokenizer")
        assert len(greedy(model)) == 4


# --- expert files


def changed(weights: dict[str, torch.Tensor]) -> None:
    weights[expert_key(weights)].mul_(-1.0)


def test_a_checkpoint_changed_in_place_is_converted_again(copy: Path, home: Path) -> None:
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        before = greedy(model)
    rewrite(copy, changed)
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        after = greedy(model)
        expected = model.hf  # the dense part is the same; the experts decide
        assert expected is not None
    assert after != before
    rewrite(copy, changed)
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        assert greedy(model) == before
    assert len(list(home.rglob(MANIFEST))) == 2  # both revisions, each in a folder of its own


def test_an_expert_file_of_another_revision_or_format_is_never_used(copy: Path, home: Path) -> None:
    """Even where it lies exactly where this one's belongs."""
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        before = greedy(model)
    mine = moe_local.convert(copy, experts="fp32")
    original = contents(mine)
    bf16 = moe_local.convert(copy, experts="bf16")
    rewrite(copy, changed)
    other = moe_local.convert(copy, experts="fp32")
    rewrite(copy, changed)
    for foreign in (other, bf16):
        shutil.rmtree(mine)
        shutil.copytree(foreign, mine)
        with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
            assert greedy(model) == before
        assert {k: v for k, v in contents(mine).items() if "layer" in k} == {
            k: v for k, v in original.items() if "layer" in k
        }


@pytest.mark.parametrize("damage", ["{", "", '{"version": 99}', '{"version": 1}', "[]"])
def test_a_damaged_manifest_is_written_again(copy: Path, damage: str) -> None:
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        before = greedy(model)
    folder = moe_local.convert(copy, experts="fp32")
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("layer-*")}
    (folder / MANIFEST).write_text(damage)
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        assert greedy(model) == before
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("layer-*")} == stamps


def test_a_missing_or_cut_layer_is_converted_again(copy: Path) -> None:
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        before = greedy(model)
    folder = moe_local.convert(copy, experts="fp32")
    (folder / "layer-00000.safetensors").unlink()
    with open(folder / "layer-00002.safetensors", "r+b") as file:
        file.truncate(10000)
    kept = (folder / "layer-00001.safetensors").stat().st_mtime_ns
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        assert greedy(model) == before
    assert (folder / "layer-00001.safetensors").stat().st_mtime_ns == kept


# --- disks


def test_a_disk_that_fills_up_in_mid_conversion(
    copy: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, written = contents(copy), 0
    write = os.write

    def fill(file: int, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > 1_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(expert_shard.os, "write", fill)
        refused(
            lambda: moe_local.load(copy, **EXACT),
            DoesNotFitError,
            "No space left on device",
            "finished layers are kept",
        )
    assert not temporary_files(home)
    kept = {path.name: path.stat().st_mtime_ns for path in home.rglob("layer-*")}
    assert kept
    with moe_local.load(copy, slots=2, context=64, **EXACT) as model:
        assert len(greedy(model)) == 4
    now = {path.name: path.stat().st_mtime_ns for path in home.rglob("layer-*")}
    assert {name: now[name] for name in kept} == kept
    assert contents(copy) == source


def test_a_home_that_is_a_file(tiny_mixtral: Path, home: Path) -> None:
    home.write_text("mine")
    said = "Not a directory; set MOE_LOCAL_HOME to a folder that can be written to"
    refused(lambda: moe_local.load(tiny_mixtral), ExpertFileError, str(home), said)
    out = tiny_mixtral / "config.json" / "out"
    refused(lambda: moe_local.convert(tiny_mixtral, out), ExpertFileError, "choose another folder")
    assert home.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_cannot_be_written(tiny_mixtral: Path, home: Path) -> None:
    home.mkdir()
    home.chmod(0o500)
    try:
        refused(lambda: moe_local.load(tiny_mixtral), ExpertFileError, str(home), "Permission denied")
    finally:
        home.chmod(0o700)


def test_a_finished_conversion_on_a_read_only_disk(
    tiny_mixtral: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads and answers; only the usage figures are not kept."""
    moe_local.convert(tiny_mixtral)

    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    real_open = os.open

    def open_read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            read_only()
        return real_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_read_only)
    monkeypatch.setattr(os, "mkdir", read_only)
    monkeypatch.setattr(os, "replace", read_only)
    with moe_local.load(tiny_mixtral, slots=2, context=64) as model:
        assert len(greedy(model)) == 4
    assert not list(home.rglob("usage.json"))


# --- a router that starves experts


@pytest.fixture(scope="module")
def starving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[tuple[int, int]]]:
    """A Mixtral whose routers never pick some experts: their logits are copies of another's, much lower."""
    folder = tmp_path_factory.mktemp("starving")
    model = tiny_models.tiny_model("mixtral")
    starved = {(0, 3), (2, 1), (2, 6)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = re.search(r"layers\.(\d+)\..*gate\.weight", name)
            for layer, expert in starved:
                if found and int(found[1]) == layer:
                    # the mean of the others': always between them, so never among the two highest of eight
                    others = [e for e in range(8) if (layer, e) not in starved]
                    parameter[expert] = parameter[others].mean(dim=0)
    model.save_pretrained(folder)
    return folder, starved


def test_starved_experts_are_reported(starving: tuple[Path, set[tuple[int, int]]]) -> None:
    folder, starved = starving
    prompt = torch.randint(3, 320, (1, 600), generator=torch.Generator().manual_seed(1))
    expert_folder = moe_local.convert(folder, experts="fp32")
    with moe_local.load(folder, slots=4, context=1024, **EXACT) as model:
        model.generate(prompt, max_new_tokens=2, eos_token_id=None)
        assert model.stats().starved == ()  # too few tokens to judge
        model.generate(prompt.flip(1), max_new_tokens=2, eos_token_id=None)
        stats = model.stats()
        assert {(item.layer, item.expert) for item in stats.starved} == starved
        assert all(item.share < 0.01 for item in stats.starved)
        assert {(item["layer"], item["expert"]) for item in stats.to_dict()["starved"]} == starved
        routed = stats.routed
    usage = read_usage(expert_folder)
    assert usage == routed
    with moe_local.load(folder, slots=4, context=1024, **EXACT) as model:
        model.generate(prompt, max_new_tokens=2, eos_token_id=None)
        later = model.stats().routed
    usage = read_usage(expert_folder)
    assert usage is not None
    assert usage.tokens == tuple(a + b for a, b in zip(routed.tokens, later.tokens, strict=True))
    assert {(item.layer, item.expert) for item in usage.starved} == starved
    (expert_folder / "usage.json").write_text("{damaged")
    with moe_local.load(folder, slots=4, context=1024, **EXACT) as model:
        model.generate(prompt, max_new_tokens=2, eos_token_id=None)
    assert read_usage(expert_folder) == later
