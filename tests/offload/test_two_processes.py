"""Two processes that want the same model at the same time: one makes it, the other waits or shares."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

import moe_local
from moe_local.offload.allocation import measure
from moe_local.offload.allocation.allocate import sensitivity_of, sensitivity_path
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.expert_file import usage
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.expert_file import MANIFEST, ExpertFile
from moe_local.offload.expert_file.usage import read_usage
from moe_local.offload.expert_file.verify import find_damage
from moe_local.offload.quantize.codec import codec_for
from support import kill_points, random_experts

PROMPT = [5, 6, 7, 9, 4]
OPTIONS: dict[str, Any] = {"experts": "fp32", "dense": "fp32", "slots": 2, "context": 64}


pytestmark = pytest.mark.usefixtures("one_thread")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_load_a_model_for_the_first_time(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of them: each shard is written once, and all give the same answer."""

    def answer() -> tuple[list[int], Path]:
        with moe_local.load(tiny_mixtral, **OPTIONS) as model:
            return model.generate(PROMPT, max_new_tokens=6, eos_token_id=None).token_ids, model.expert_folder

    monkeypatch.setattr(usage, "PATIENCE_S", 100.0)  # however long another one's write takes
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "alone"))
    ids, folder = answer()
    alone = read_usage(folder)
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    started = tmp_path / "go"

    def work(number: int) -> None:
        real = os.replace

        def replace(source: Any, target: Any) -> None:
            real(source, target)
            with open(tmp_path / f"written{number}", "a") as file:
                file.write(Path(target).name + "\n")

        os.replace = replace  # type: ignore[assignment]
        (tmp_path / f"ready{number}").touch()
        wait_for(started.exists)
        assert answer()[0] == ids

    children = [kill_points.fork(lambda number=number: work(number)) for number in range(3)]
    wait_for(lambda: all((tmp_path / f"ready{number}").exists() for number in range(3)))
    started.touch()
    assert [kill_points.exit_status(pid) for pid in children] == [0, 0, 0]
    written = [(tmp_path / f"written{n}").read_text().split() for n in range(3)]
    shards = sorted(name for names in written for name in names if name.startswith("layer-"))
    assert shards == [f"layer-{layer:05d}.safetensors" for layer in range(3)]
    (manifest,) = (tmp_path / "home").rglob(MANIFEST)
    assert not find_damage(ExpertFile.open(manifest.parent))
    counts = read_usage(manifest.parent)
    assert counts is not None
    assert alone is not None
    assert counts.tokens == tuple(3 * tokens for tokens in alone.tokens)


def test_who_waits_takes_over_from_one_that_is_killed(tmp_path: Path) -> None:
    """And keeps the shards that were finished."""
    source = random_experts.RandomExperts(layers=4, experts=4)
    codec, folder = codec_for("bf16"), tmp_path / "f"
    calm = convert_experts(source, codec, tmp_path / "calm")
    real = source.read_expert

    def convert_in_part() -> None:
        def stuck(layer: Any, expert: int, *args: Any) -> Any:
            if (layer.index, expert) == (2, 1):
                threading.Event().wait()
            return real(layer, expert, *args)

        source.read_expert = stuck
        convert_experts(source, codec, folder)

    first = kill_points.fork(convert_in_part)
    wait_for(lambda: (folder / "layer-00001.safetensors").exists())
    stamp = (folder / "layer-00000.safetensors").stat().st_mtime_ns
    second = kill_points.fork(lambda: convert_experts(source, codec, folder))
    time.sleep(0.1)
    os.kill(first, signal.SIGKILL)
    assert kill_points.exit_status(first) == -signal.SIGKILL
    assert kill_points.exit_status(second) == 0
    assert (folder / "layer-00000.safetensors").stat().st_mtime_ns == stamp
    for path in calm.folder.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert len(list(folder.iterdir())) == len(list(calm.folder.iterdir()))
    with filelock.FileLock(f"{folder}.lock").acquire(timeout=0):
        pass


def test_two_measure_a_model_for_the_first_time(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed at it; of the two that wait one goes on behind what it kept, and both have the same."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(measure, "SAVE_SECONDS", -1.0)
    checkpoint = Checkpoint.open(tiny_mixtral)
    total = sum(layer.num_experts for layer in checkpoint.spec.layers)
    real = measure.expert_errors

    def work(number: int, stop_at: int = 0) -> None:
        def counted(*args: Any) -> Any:
            with open(tmp_path / f"measured{number}", "a") as file:
                file.write("x")
            if stop_at and count(number) == stop_at:
                signal.pause()
            return real(*args)

        measure.expert_errors = counted
        (tmp_path / f"found{number}").write_text(repr(sensitivity_of(checkpoint)))

    def count(number: int) -> int:
        path = tmp_path / f"measured{number}"
        return path.stat().st_size if path.exists() else 0

    first = kill_points.fork(lambda: work(0, stop_at=12))
    wait_for(lambda: count(0) == 12)
    others = [kill_points.fork(lambda number=number: work(number)) for number in (1, 2)]
    time.sleep(0.1)
    assert count(1) == count(2) == 0
    os.kill(first, signal.SIGKILL)
    assert kill_points.exit_status(first) == -signal.SIGKILL
    assert [kill_points.exit_status(pid) for pid in others] == [0, 0]
    assert sorted([count(1), count(2)]) == [0, total - 8]  # a layer of 8 was kept
    assert (tmp_path / "found1").read_text() == (tmp_path / "found2").read_text()
    path = sensitivity_path(checkpoint)
    assert sorted(found.name for found in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_a_model_is_read_while_it_is_checked_and_mended(tmp_path: Path) -> None:
    """A reader meets the right bytes or ones that its checksum refuses, never wrong ones."""
    source = random_experts.RandomExperts(layers=1, experts=4)
    codec, folder = codec_for("bf16"), tmp_path / "f"
    file = convert_experts(source, codec, folder)
    whole = [file.read(0, expert) for expert in range(4)]
    path, offset, nbytes = file.location(0, 2)
    stop = tmp_path / "stop"

    def mend() -> None:
        raw = bytearray(path.read_bytes()[offset : offset + nbytes])
        while not stop.exists():
            with open(path, "r+b") as shard:
                shard.seek(offset)
                shard.write(bytes(byte ^ 1 for byte in raw))
            convert_experts(source, codec, folder, check=True)

    pid = kill_points.fork(mend)
    refused = right = 0
    deadline = time.monotonic() + 100
    try:
        while (refused < 5 or right < 5) and time.monotonic() < deadline:
            for expert in range(4):
                try:
                    found = ExpertFile.open(folder).read(0, expert)
                except moe_local.MoeLocalError:
                    refused += 1
                    continue
                right += expert == 2
                assert found == whole[expert]
    finally:
        stop.touch()
        assert kill_points.exit_status(pid) == 0
    assert refused >= 5
    assert right >= 5
