"""disk.py: groups of limited memory, runs that are kept, and the figures made of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import disk
import memory_group as groups
import pytest

MIB = 2**20


def record(ms: float, read: int = 0, **changes: Any) -> dict[str, Any]:
    figures = {"read_bytes": 10 * read}
    return {
        "load_s": 1.0,
        "prefill_s": 0.5,
        "ms_per_token": ms,
        "tokens": 10,
        "ids": [1, 2],
        "figures": figures,
        "disk_bytes_per_s": [1e9, 3e9],
        "hello": {"name": "x"},
        **changes,
    }


def test_a_process_in_a_group_is_killed_when_it_takes_more() -> None:
    code = "import sys; data = bytearray(int(sys.argv[1]) << 20); data[::4096] = b'x' * len(data[::4096])"
    try:
        with groups.memory_group(64 * MIB) as prefix:
            within, beyond = (
                subprocess.run([*prefix, sys.executable, "-c", code, str(size)], check=False).returncode
                for size in (8, 256)
            )
    except SystemExit as error:
        pytest.skip(str(error))
    assert within == 0
    assert beyond in (-9, 137)


def test_without_rights_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "GROUPS", tmp_path / "none")
    monkeypatch.setattr(groups, "SYSTEMD", tmp_path / "none")
    with (
        pytest.raises(SystemExit, match=r"no memory limit can be set here .* run it as root"),
        groups.memory_group(1),
    ):
        pass


def test_systemd_is_asked_for_a_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = groups.systemd_command(5)
    assert command[:3] == ["systemd-run", "--user", "--scope"]
    assert "MemoryMax=5" in command
    assert command[-1] == "--"


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * MIB)
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if groups.in_page_cache([path]) is None or kind.stdout.strip() in ("", "tmpfs"):
        pytest.skip("no fincore here, or files that are nowhere else")
    path.read_bytes()
    assert groups.in_page_cache([path]) == MIB
    for _ in range(100):  # a page that the system moves about at this moment stays
        groups.forget([path])
        if not groups.in_page_cache([path]):
            break
    assert groups.in_page_cache([path]) == 0


def test_runs_are_kept_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[Any] = []

    def measure(model: Any, run: Any, options: Any) -> dict[str, Any]:
        measured.append(run)
        if run.contender == "accelerate" and run.limit == "2GiB":
            return {"failed": "killed: out of memory"}
        return record(
            {"ours": 100, "ours without prefetch": 125, "llama.cpp": 250, "accelerate": 900}[run.contender]
        )

    monkeypatch.setattr(disk, "measure", measure)
    monkeypatch.setattr(disk, "prepare", lambda options: None)
    arguments = [
        "--rounds", "2", "--accelerate-rounds", "2", "--limit", "8GiB", "2GiB",
        "--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "json"),
    ]  # fmt: skip
    for _ in range(20):
        disk.main([*arguments, "--once"])
        if (out := capsys.readouterr().out) and out.splitlines()[-1].startswith("{"):
            break
    assert len(measured) == len(set(measured)) == 15  # what was killed is not tried again
    assert {run.contender for run in measured[:8]} == set(disk.CONTENDERS)
    result = json.loads((tmp_path / "json").read_text())
    found = {(row["limit"], row["contender"]): row for row in result["rows"]}
    assert found["8GiB", "ours"]["tokens_per_s"] == pytest.approx(10)
    assert found["2GiB", "accelerate"]["failed"] == "killed: out of memory"
    ratios = {(ratio["limit"], ratio["peer"]): ratio for ratio in result["ratios"]}
    assert ratios["8GiB", "llama.cpp"]["median"] == pytest.approx(2.5)
    assert ("2GiB", "accelerate") not in ratios


def test_figures_of_a_contender() -> None:
    figures = {
        "read_bytes": 10_000_000_000, "expert_bytes": 9_000_000_000, "reading_s": 5.0, "stall_s": 4.0,
        "hits": 30, "misses": 10,
    }  # fmt: skip
    row = disk.summary([record(1000.0, figures=figures)])
    assert row["read_bytes_per_token"] == 1e9
    assert row["floor_ms_per_token"] == pytest.approx(500)
    assert row["share_of_floor"] == pytest.approx(0.5)
    assert row["reads_over_sequential"]["median"] == pytest.approx(0.9)
    assert row["hit_rate"] == 0.75
    assert row["stall_ms_per_token"] == pytest.approx(400)


def test_ids_of_ours_must_agree() -> None:
    same, other = record(1.0), record(1.0, ids=[1, 3])
    disk.check_equal({disk.Run("8GiB", 0, "ours"): same, disk.Run("2GiB", 0, "llama.cpp"): other})
    with pytest.raises(SystemExit, match="ids of ours in 2GiB differ"):
        disk.check_equal({disk.Run("8GiB", 0, "ours"): same, disk.Run("2GiB", 0, "ours"): other})


def test_sequential_bandwidth_of_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which reading takes two seconds."""
    monkeypatch.setattr(disk, "time", SimpleNamespace(perf_counter=iter((5.0, 7.0)).__next__))
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB + 5))
    assert disk.sequential_bandwidth([path]) == 3 * MIB / 2
