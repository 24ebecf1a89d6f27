"""The benchmark runs, prints its figures beside the targets, and leaves them as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_one_round(repository: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(repository / "benchmarks" / "cache_overhead.py")]
    done = subprocess.run(
        [*command, "--rounds", "1", "--policy", "fifo", "--json", str(result)],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(result.read_text()) == document
    cases = document["cases"]
    assert {"floor", "layer", "all_hits", "zipf"} <= cases.keys()
    assert cases["layer"]["target_us"] == 15
    assert cases["all_hits"]["target_us"] == 1000
    assert cases["zipf"]["hit_rate"] == pytest.approx(0.8, abs=0.05)
    assert 0 < cases["floor"]["median_us"] < cases["layer"]["median_us"] < cases["all_hits"]["median_us"]
    assert "acquire + release of 8 resident experts" in done.stdout


def test_no_rounds_are_refused(repository: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks" / "cache_overhead.py"), "--rounds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--rounds 0 measures nothing" in done.stderr
