"""Conversion: right, resumable after anything, and alone."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_local.cache.errors import CheckpointError, DoesNotFitError, ExpertFileError
from moe_local.cache.files import locked
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.shards import read_header
from moe_local.offload.checkpoint.spec import model_spec
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.expert_file import MANIFEST, ExpertFile
from moe_local.offload.expert_file.verify import find_damage
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.system.patience import PATIENCE_S
from support import random_experts, tiny_models

BF16 = codec_for("bf16")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source():
    return random_experts.RandomExperts(layers=3, experts=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shards(*layers: int) -> list[str]:
    return [f"layer-{layer:05d}.safetensors" for layer in layers]


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its id. Exit status 0, or 1 for an exception."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- what comes out


@pytest.mark.parametrize("format", ["nf4", "bf16", "fp16", "fp32"])
def test_every_expert_comes_back(source, tmp_path, format):
    seen = []
    file = convert_experts(source, codec_for(format), tmp_path / "f", lambda *counts: seen.append(counts))
    codec = codec_for(format)
    for layer in source.spec.layers:
        for expert in range(layer.num_experts):
            buffer = torch.frombuffer(file.read(layer.index, expert), dtype=torch.uint8)
            decoded = codec.decode(buffer, file.layout(layer.index, expert), torch.float32)
            for name, weights in source.weights(layer, expert).items():
                error = (decoded[name] - weights.float()).norm() / weights.float().norm()
                assert (
                    error == 0 if format in ("bf16", "fp32") else error < (0.12 if format == "nf4" else 1e-3)
                )
    size = file.nbytes(0, 0)
    assert seen == [(done, 12, done * size) for done in range(1, 13)]
    assert names(tmp_path / "f") == [*shards(0, 1, 2), MANIFEST]


def test_two_experts_in_memory_at_a_time(source, tmp_path):
    convert_experts(source, BF16, tmp_path / "f")
    assert source.most_alive <= 1


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_names_are_those_of_the_model(make_checkpoint, tmp_path, model_type):
    """What a spec calls the tensors, the checkpoint gives and the file returns, equal to the model's own."""
    checkpoint = Checkpoint.open(make_checkpoint(model_type))
    model = tiny_models.tiny_model(model_type)
    assert checkpoint.spec == model_spec(model.config)
    file = convert_experts(checkpoint, codec_for("fp32"), tmp_path / "f")
    parameters = dict(model.named_parameters())
    for layer in checkpoint.spec.layers:
        for expert in range(layer.num_experts):
            layout = file.layout(layer.index, expert)
            buffer = torch.frombuffer(file.read(layer.index, expert), dtype=torch.uint8)
            decoded = codec_for("fp32").decode(buffer, layout, torch.float32)
            for tensor in layer.tensors:
                expected = parameters[f"{layer.name}.{tensor.name}"][expert]
                expected = expected.T if layer.transposed and expected.dim() == 2 else expected
                assert torch.equal(decoded[tensor.name], expected)


# --- resuming


def test_a_complete_file_is_opened(source, tmp_path):
    convert_experts(source, BF16, tmp_path / "f")
    again = random_experts.RandomExperts(layers=3, experts=4)
    before = contents(tmp_path / "f")
    assert convert_experts(again, BF16, tmp_path / "f").total_experts == 12
    assert convert_experts(again, BF16, tmp_path / "f", check=True).total_experts == 12
    assert again.reads == []
    assert contents(tmp_path / "f") == before


@pytest.mark.parametrize("changed", ["fingerprint", "format", "layers"])
def test_another_file_in_the_folder_is_replaced(source, tmp_path, changed):
    convert_experts(source, BF16, tmp_path / "f")
    other = random_experts.RandomExperts(
        layers=4 if changed == "layers" else 3, experts=4, seed=changed != "format"
    )
    codec = codec_for("fp16") if changed == "format" else BF16
    file = convert_experts(other, codec, tmp_path / "f")
    assert len(other.reads) == other.spec.layers[-1].index * 4 + 4
    assert not find_damage(file)
    assert (file.fingerprint, file.format) == (other.fingerprint, codec.name)


def test_ctrl_c_keeps_finished_shards(source, tmp_path):
    source.fail_at = (2, 1)
    with pytest.raises(KeyboardInterrupt):
        convert_experts(source, BF16, tmp_path / "f")
    assert names(tmp_path / "f") == shards(0, 1)
    again = random_experts.RandomExperts(layers=3, experts=4)
    seen = []
    file = convert_experts(again, BF16, tmp_path / "f", lambda done, total, nbytes: seen.append(done))
    assert again.reads == [(2, expert) for expert in range(4)]
    assert seen == list(range(1, 13))
    assert not find_damage(file)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("damage", ["flip", "cut", "header", "remove"])
def test_damaged_experts_are_converted_again(source, tmp_path, damage, with_manifest):
    """And no others, where header or manifest still say what the others were."""
    file = convert_experts(source, BF16, tmp_path / "f")
    whole = contents(tmp_path / "f")
    path, offset, _ = file.location(1, 2)
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[offset + 5] ^= 1
    elif damage == "header":
        raw[40] ^= 1
    path.write_bytes(raw[:-4096] if damage == "cut" else raw)
    if damage == "remove":
        path.unlink()
    if not with_manifest:
        (tmp_path / "f" / MANIFEST).unlink()
    again = random_experts.RandomExperts(layers=3, experts=4)
    convert_experts(again, BF16, tmp_path / "f", check=True)
    alone = {"flip": [2], "cut": [3] * with_manifest, "header": [], "remove": []}[damage]
    kept = damage == "flip" or (with_manifest and damage != "remove")
    assert again.reads == [(1, expert) for expert in (alone if kept else range(4))]
    assert contents(tmp_path / "f") == whole


def test_a_shard_of_damaged_experts_is_written_anew(source, tmp_path):
    """Not in place: a shard of which nothing can be kept may as well appear whole."""
    file = convert_experts(source, BF16, tmp_path / "f")
    whole = contents(tmp_path / "f")
    path = file.location(1, 0).path
    path.write_bytes(path.read_bytes()[:4096].ljust(file.layers[1].nbytes, b"x"))
    again = random_experts.RandomExperts(layers=3, experts=4)
    with open(path, "rb") as before:
        convert_experts(again, BF16, tmp_path / "f", check=True)
        assert before.read()[4096:].strip(b"x") == b""
    assert again.reads == [(1, expert) for expert in range(4)]
    assert contents(tmp_path / "f") == whole


def test_another_encoding_is_never_mixed_in(source, tmp_path, caplog):
    """A source that gives other bytes than it did (a newer encoder): the whole shard is made of them."""
    file = convert_experts(source, BF16, tmp_path / "f")
    path, offset, _ = file.location(1, 2)
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)
    plain = source.weights
    source.weights = lambda layer, expert: {name: w + 1 for name, w in plain(layer, expert).items()}
    source.reads.clear()
    file = convert_experts(source, BF16, tmp_path / "f", check=True)
    assert source.reads == [(1, 2), *((1, expert) for expert in range(4))]
    assert not find_damage(file)
    assert not find_damage(ExpertFile.open(tmp_path / "f"))
    stored = torch.frombuffer(file.read(1, 0), dtype=torch.uint8)
    decoded = codec_for("bf16").decode(stored, file.layout(1, 0), torch.bfloat16)
    assert torch.equal(decoded["down_proj"], plain(source.spec.layers[1], 0)["down_proj"] + 1)


def test_killed_at_random_moments(tmp_path):
    """SIGKILL again and again: what is there afterwards resumes to the bytes of an undisturbed conversion."""
    experts = random_experts.RandomExperts(layers=6, experts=4)
    convert_experts(experts, BF16, tmp_path / "calm")
    started = time.monotonic()
    convert_experts(experts, BF16, tmp_path / "timed")
    duration = time.monotonic() - started + 24 * 0.002
    experts.delay_s = 0.002
    moments = random.Random(0)
    stages, attempt = set(), 0
    while attempt < 12 or len(stages) <= 2:  # until the kills met conversions at different stages
        folder = tmp_path / f"killed{attempt % 3 + attempt // 12}"
        attempt += 1
        pid = in_child(lambda folder=folder: convert_experts(experts, BF16, folder))
        time.sleep(moments.uniform(0, duration / 2))
        os.kill(pid, signal.SIGKILL)
        duration *= 0.8 if exit_status(pid) == 0 else 1.1  # a busy machine takes now so long, now so
        found = names(folder) if folder.exists() else []
        stages.add((len(found), any(name.endswith(".tmp") for name in found)))
        if MANIFEST in found:
            assert not find_damage(ExpertFile.open(folder))
    for attempt in range(3):
        convert_experts(experts, BF16, tmp_path / f"killed{attempt}")
        assert contents(tmp_path / f"killed{attempt}") == contents(tmp_path / "calm")


# --- failing


@pytest.mark.parametrize("format", ["nf4", "bf16"])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_bad_weights_are_named(source, tmp_path, format, value, word):
    good = source.weights

    def weights(layer, expert):
        tensors = good(layer, expert)
        if (layer.index, expert) == (1, 3):
            tensors["down_proj"][5, 7] = value
        return tensors

    source.weights = weights
    with pytest.raises(CheckpointError) as caught:
        convert_experts(source, codec_for(format), tmp_path / "f")
    assert str(caught.value) == (
        "tiny/Random-Experts: model.layers.1.mlp.experts, expert 3: down_proj has 1 of 6144 weights "
        f"that are {word}; the checkpoint is damaged, download it again"
    )
    assert names(tmp_path / "f") == shards(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("down_proj"), "expert 0: down_proj is missing"),
        (
            lambda tensors: tensors.update(down_proj=torch.zeros(96, 64)),
            r"down_proj is torch.float32 \(96, 64\)",
        ),
        (lambda tensors: tensors.update(down_proj=torch.zeros(64, 96).int()), r"down_proj is torch.int32"),
    ],
)
def test_wrong_tensors_are_named(source, tmp_path, change, message):
    good = source.weights

    def weights(layer, expert):
        tensors = good(layer, expert)
        change(tensors)
        return tensors

    source.weights = weights
    with pytest.raises(CheckpointError, match=message):
        convert_experts(source, BF16, tmp_path / "f")
    assert names(tmp_path / "f") == []


def test_a_disk_too_small_is_told_before(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        DoesNotFitError, match=r"to bf16 needs 444 KiB in .*which has 97.7 KiB free; free 346 KiB"
    ):
        convert_experts(source, BF16, tmp_path / "f")
    assert source.reads == []


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fills_up(source, tmp_path, monkeypatch, call):
    """The system call fails as it does on a full disk, in the second shard."""
    real, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(arguments)
        # a shard is written as header, 4 experts, header; folder, shard and folder are synced before
        if len(calls) > {"write": 8, "fsync": 3}[call]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        DoesNotFitError, match=r"layer-00001.* \(148 KiB\): No space left on device; free"
    ) as caught:
        convert_experts(source, BF16, tmp_path / "f")
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "f") == shards(0)
    again = random_experts.RandomExperts(layers=3, experts=4)
    assert not find_damage(convert_experts(again, BF16, tmp_path / "f"))
    assert len(again.reads) == 8


def test_a_limit_on_file_sizes(source, tmp_path):
    """The system itself refuses, in a process of its own: resource limit on the size of a file."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(DoesNotFitError, match=r"layer-00000.*File too large"):
            convert_experts(source, BF16, tmp_path / "f")

    assert exit_status(in_child(work)) == 0
    assert names(tmp_path / "f") == []


def test_short_writes_are_completed(source, tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: max(1, len(data) // 2)]))
    assert not find_damage(convert_experts(source, BF16, tmp_path / "f"))


def test_a_folder_that_cannot_be(source, tmp_path):
    (tmp_path / "f").write_text("a file")
    with pytest.raises(ExpertFileError, match=r"cannot write .*File exists"):
        convert_experts(source, BF16, tmp_path / "f")
    assert (tmp_path / "f").read_text() == "a file"


# --- two at once


def test_the_second_waits_and_uses_the_result(tmp_path, caplog):
    first, second = (random_experts.RandomExperts(layers=2, experts=2) for _ in range(2))
    go_on, reading = threading.Event(), threading.Event()
    plain = first.read_expert

    def read_expert(layer, expert, memory):
        reading.set()
        assert go_on.wait(100)
        return plain(layer, expert, memory)

    first.read_expert = read_expert
    results = {}

    def work(name, experts):
        results[name] = convert_experts(experts, BF16, tmp_path / "f")

    threads = [threading.Thread(target=work, args=pair) for pair in (("first", first), ("second", second))]
    with caplog.at_level(logging.WARNING):
        threads[0].start()
        assert reading.wait(100)
        threads[1].start()
        while not caplog.records:
            time.sleep(0.01)
        assert not results
        go_on.set()
        for thread in threads:
            thread.join(100)
    assert [record.message for record in caplog.records] == [
        f"waiting for another process that converts to {tmp_path / 'f'}"
    ]
    assert len(first.reads) == 4
    assert second.reads == []
    assert results["first"].layers == results["second"].layers


def test_four_processes_at_once(tmp_path):
    experts = random_experts.RandomExperts(layers=3, experts=4)
    convert_experts(experts, BF16, tmp_path / "alone")
    experts.delay_s = 0.002

    def work(number: int) -> None:
        experts.reads.clear()
        assert not find_damage(convert_experts(experts, BF16, tmp_path / "f"))
        (tmp_path / f"reads{number}").write_text(str(len(experts.reads)))

    children = [in_child(lambda number=number: work(number)) for number in range(4)]
    assert [exit_status(pid) for pid in children] == [0] * 4
    assert sorted(int((tmp_path / f"reads{number}").read_text()) for number in range(4)) == [0, 0, 0, 12]
    assert contents(tmp_path / "f") == contents(tmp_path / "alone")


# --- a source that does not answer


@pytest.fixture
def share(make_checkpoint, tmp_path, impatient):
    """A checkpoint on a share whose server can go, for good: `share.gone(name)`, `share.back()`."""

    class Share:
        folder = Path(shutil.copytree(make_checkpoint("mixtral", shards=3), tmp_path / "model"))
        aside: tuple[Path, Path] | None = None

        def gone(self, name: str) -> Path:
            path = self.folder / name
            self.aside = path, path.rename(tmp_path / "aside")
            os.mkfifo(path)
            impatient.add(path)
            return path

        def back(self) -> None:
            path, kept = self.aside
            while any(thread.name.startswith("read-") for thread in threading.enumerate()):
                try:
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                except OSError:  # nobody opens it at this moment
                    time.sleep(0.01)
            path.unlink()
            kept.rename(path)
            impatient.remove(path)
            self.aside = None

    share = Share()
    yield share
    if share.aside:
        share.back()


def test_a_source_that_hangs_is_named_and_gone_on_with(share, tmp_path):
    checkpoint = Checkpoint.open(share.folder)
    convert_experts(checkpoint, BF16, tmp_path / "calm")
    holds = {tensor.shard for key, tensor in checkpoint.shards.tensors.items() if "layers.2" in key}
    path = share.gone(max(holds))
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        convert_experts(checkpoint, BF16, tmp_path / "f")
    assert time.monotonic() - began < PATIENCE_S
    assert str(caught.value) == (
        f"{path} is being read, and its disk has given nothing for 0 s; check the disk, or what connects it"
    )
    kept = names(tmp_path / "f")
    assert kept == shards(*range(len(kept)))
    assert kept
    with locked(tmp_path / "f", timeout_s=0):
        pass
    share.back()
    convert_experts(checkpoint, BF16, tmp_path / "f")
    assert contents(tmp_path / "f") == contents(tmp_path / "calm")


def test_a_source_that_hangs_before_it_begins(share):
    """In its headers, and in what its fingerprint is made of."""
    fingerprint = Checkpoint.open(share.folder).fingerprint
    opened = Checkpoint.open(share.folder)
    path = share.gone(min(opened.shards.sizes))
    with pytest.raises(CheckpointError, match="given nothing for 0 s; check the disk") as caught:
        assert opened.fingerprint
    assert str(caught.value).startswith(f"{path} is being read")
    with pytest.raises(CheckpointError, match="given nothing for 0 s; check the disk"):
        read_header(path)
    share.back()
    assert opened.fingerprint == fingerprint
