"""The benchmark runs, prints its figures beside the targets, and leaves them as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import cache_overhead
import pytest


def test_one_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    assert cache_overhead.main(["--rounds", "1", "--policy", "fifo", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert json.loads(result.read_text()) == document
    cases = document["cases"]
    assert {"floor", "layer", "all_hits", "zipf"} <= cases.keys()
    assert cases["layer"]["target_us"] == 15
    assert cases["all_hits"]["target_us"] == 1000
    assert cases["zipf"]["hit_rate"] == pytest.approx(0.8, abs=0.05)
    assert 0 < cases["floor"]["median_us"] < cases["layer"]["median_us"] < cases["all_hits"]["median_us"]
    assert "acquire + release of 8 resident experts" in printed


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cache_overhead.main(["--rounds", "0"])
    assert left.value.code == 2
    assert "--rounds 0 measures nothing" in capsys.readouterr().err
