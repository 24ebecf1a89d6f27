"""What is free, within the limits of control groups as containers of both versions show them."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.gpu.capturing import alone
from moe_local.offload.plan import free_memory
from moe_local.offload.plan.free_memory import Limit, free_ram, group_limits

MIB, GIB = 2**20, 2**30
NO_LIMIT_1 = "9223372036854771712"


def version_1(folder: Path, limit: int | str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 5\ninactive_file 1\ntotal_inactive_file {inactive}\n")


def version_2(folder: Path, limit: int | str, used: int, inactive: int = 0, high: int | str = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")


def limits(folder: Path, text: str) -> list[Limit]:
    (folder / "cgroup").write_text(text)
    return group_limits(folder, folder / "cgroup")


def test_a_group_of_version_2_and_those_around_it(tmp_path: Path) -> None:
    version_2(tmp_path / "user" / "job", 2 * GIB, 500 * MIB, 100 * MIB)
    version_2(tmp_path / "user", 4 * GIB, 3 * GIB)
    found = limits(tmp_path, "0::/user/job\n")
    assert found == [Limit(2 * GIB, 2 * GIB - 400 * MIB), Limit(4 * GIB, GIB)]


def test_a_container_of_version_2_is_its_own_root(tmp_path: Path) -> None:
    version_2(tmp_path, 2 * GIB, GIB)
    assert limits(tmp_path, "0::/\n") == [Limit(2 * GIB, GIB)]
    assert limits(tmp_path, "0::/not/seen/from/here\n") == [Limit(2 * GIB, GIB)]


def test_what_slows_a_group_down_bounds_it(tmp_path: Path) -> None:
    version_2(tmp_path, "max", GIB, high=3 * GIB)
    assert limits(tmp_path, "0::/\n") == [Limit(3 * GIB, 2 * GIB)]


def test_groups_of_version_1(tmp_path: Path) -> None:
    version_1(tmp_path / "memory", NO_LIMIT_1, 9 * GIB)
    version_1(tmp_path / "memory" / "docker" / "abc", 3 * GIB, 2 * GIB, 512 * MIB)
    text = "4:cpuset:/docker/abc\n3:memory:/docker/abc\n0::/\n"
    assert limits(tmp_path, text) == [Limit(3 * GIB, GIB + 512 * MIB)]


def test_a_container_of_version_1_that_is_told_of_a_path_it_does_not_see(tmp_path: Path) -> None:
    version_1(tmp_path / "memory", 3 * GIB, GIB)
    assert limits(tmp_path, "3:cpu,memory:/docker/abc\n") == [Limit(3 * GIB, 2 * GIB)]


def test_paths_do_not_lead_out_of_the_groups(tmp_path: Path) -> None:
    version_2(tmp_path, 2 * GIB, GIB)
    version_2(tmp_path.parent, 1, 0)
    assert limits(tmp_path, "0::/../../other\n") == [Limit(2 * GIB, GIB)]


def test_no_limit_and_no_groups(tmp_path: Path) -> None:
    version_2(tmp_path / "job", "max", GIB)
    version_1(tmp_path / "memory", NO_LIMIT_1, GIB)
    assert limits(tmp_path, "3:memory:/\n0::/job\nnonsense\n") == []
    assert group_limits(tmp_path, tmp_path / "absent") == []


def test_more_used_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    version_2(tmp_path, GIB, GIB + MIB)
    assert limits(tmp_path, "0::/\n") == [Limit(GIB, 0)]


@pytest.mark.parametrize(
    ("groups", "free", "with_reserve"),
    [
        ([], 30 * GIB, 28 * GIB),  # a sixteenth of the machine
        ([Limit(8 * GIB, 6 * GIB)], 6 * GIB, 6 * GIB - 512 * MIB),  # a sixteenth of the limit
        ([Limit(GIB, GIB)], GIB, GIB - 128 * MIB),
        ([Limit(GIB, 200 * MIB)], 200 * MIB, 100 * MIB),  # never more than half of what is free
        ([Limit(64 * GIB, 60 * GIB)], 30 * GIB, 28 * GIB),  # the machine is the tighter bound
        ([Limit(64 * GIB, 31 * GIB)], 30 * GIB, 27 * GIB),  # each has its own reserve
        ([Limit(8 * GIB, 6 * GIB), Limit(2 * GIB, GIB)], GIB, GIB - 128 * MIB),
    ],
)
def test_the_tightest_bound_counts(
    groups: list[Limit], free: int, with_reserve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = SimpleNamespace(available=30 * GIB, total=32 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(free_memory, "group_limits", lambda: groups)
    assert free_ram(reserve=False) == free
    assert free_ram() == with_reserve


def test_a_limit_of_this_very_system_is_seen() -> None:
    """A process in a real group of 1 GiB sees what is left of that."""
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    root = next((r for r in roots if (r / "cgroup.procs").exists()), None)
    name, bound = f"moe-local-test-{uuid.uuid4().hex[:8]}", "memory.limit_in_bytes"
    try:
        if root is None:
            raise OSError("no control groups")
        group = root / name
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        bound = bound if (group / bound).exists() else "memory.max"
        try:
            (group / bound).write_text(str(GIB))
        except OSError as error:
            pytest.skip(f"no memory limit can be set here: {error}")
        code = (
            "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
            "from moe_local.offload.plan.free_memory import free_ram\n"
            "print(free_ram(reserve=False), free_ram())"
        )
        command = [sys.executable, "-c", code, str(group / "cgroup.procs")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        free, reserved = map(int, done.stdout.split())
        assert GIB // 2 < free < GIB
        assert abs(reserved - (free - GIB // 8)) < 16 * MIB  # some may have been taken between the two
    finally:
        group.rmdir()


def test_a_card_that_is_not_to_be_had_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for it")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    with pytest.raises(
        MoeLocalError, match=r"^cuda:1 cannot be used: CUDA error: .* unavailable; end"
    ) as raised:
        free_memory.free_vram(torch.device("cuda:1"))
    assert "\n" not in str(raised.value)


def test_what_torch_keeps_of_a_closed_model_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given back to the driver, but not while another thread captures, whose graph that would spoil."""
    kept, locked = [20 * GIB], []

    def empty_cache() -> None:
        other = threading.Thread(target=lambda: locked.append(not alone.acquire(blocking=False)))
        other.start()
        other.join()
        kept.clear()

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (23 * GIB - sum(kept), 24 * GIB))
    assert free_memory.free_vram(torch.device("cuda:0"), reserve=False) == 23 * GIB
    assert locked == [True]
