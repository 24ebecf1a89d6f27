"""gpu_figures.py: shares of the floor by hand, targets that hold and that do not, lines of parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_figures as figures
import pytest


def document(**changes: Any) -> dict[str, Any]:
    """As of `moe-local bench`: a token reads 2 ms of VRAM, 8 ms of the link, and 6 ms of RAM."""
    row = {
        "repeats": 3,
        "bytes_per_token": {"h2d": 200.0, "disk": 0.0},
        "misses_per_token": 3.0,
        "tpot_ms": {"mean": 10.0},
        "tokens_per_s": {"decode": 100.0},
        "stall_ms_per_token": {"demand": 3.0, "sync": 0.5, "cpu": 0.0},
        "ttft_s": 0.25,
        "hit_rate_timed": 0.75,
    }
    return {
        "benchmark": "latency",
        "bandwidths": {"vram": 1e6, "h2d": 25e3, "ram": 50e3, "disk": 1e3},
        "plan": {"bytes": {"expert": 100}, "mode": "offload", "slots": {"vram": 4}},
        "floor": {"ms_per_token": 2.0},
        "machine": {"gpu": {"name": "one"}},
        "peak_bytes": {"vram": 2**30},
        "workloads": {"single": row},
        "compare": [
            {"name": "miss cpu", "decode": {"median": 0.5}, "figures": {**row, "misses_per_token": 9.0}}
        ],
        "notes": ["made", "other tokens than as loaded: miss cpu"],
        **row,
        **changes,
    }


def test_the_slowest_of_memory_link_and_ram_is_the_floor() -> None:
    found = document()
    assert figures.floor_ms(found, found) == pytest.approx(8)  # 200 bytes at 25 a millisecond
    assert figures.share(found, found) == pytest.approx(0.8)
    by_cpu = {**found, "bytes_per_token": {"h2d": 0.0, "disk": 0.0}}
    assert figures.floor_ms(found, by_cpu) == pytest.approx(6)  # three misses of 100 bytes at 50
    resident = {**by_cpu, "misses_per_token": 0.0}
    assert figures.floor_ms(found, resident) == pytest.approx(2)
    assert figures.floor_ms({**found, "machine": {"gpu": None}}, by_cpu) == pytest.approx(2)


def test_the_lines_of_a_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    figures.print_part({"status": 0, "result": document()})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == (
        "single: 100.0 tok/s, 10.00 ms, 0.80 of the floor's, TTFT 0.250 s, hits 75%, "
        "stalls demand 3.00, sync 0.50"
    )
    assert lines[-2:] == [
        "   miss cpu: 0.50 of that speed, 1.80 of the floor's",
        "   other tokens than as loaded: miss cpu",
    ]


def test_what_failed_shows_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    figures.print_part({"status": 1, "result": {"output": ["1 failed"]}, "errors": ["why"]})
    figures.print_part({"status": 124, "result": document(tpot_ms={"mean": 20.0})})
    said = capsys.readouterr().out
    assert said.startswith("   1 failed\n   why\n")
    assert "100.0 tok/s" in said  # of what was measured by then


def test_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, slow = document(), document(tpot_ms={"mean": 16.0})
    resident = {"benchmark": "resident", "ratio": {"median": 0.97}}
    ratios = [{"ours": "o", "peer": f"p{n}", "decode": {"median": n}} for n in (2.0, 1.4)]
    found = {
        "mixtral_recorded": {"status": 0, "result": good},
        "mixtral_recorded_25GBs": {"status": 0, "result": slow},
        "qwen3_half_by_host": {"status": 0, "result": good},
        "resident": {"status": 0, "result": resident},
        "llama.cpp": {"status": 0, "result": {"benchmark": "decode", "ratios": ratios}},
        "transformers": {"status": 1, "result": {"output": []}},
        "tests": {"status": 0, "result": {"output": ["3 passed"]}},
        "late": {"status": None, "seconds": 0, "errors": ["no time was left for it"]},
    }
    figures.print_targets(found)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["holds", "MISSED", "holds", "holds", "MISSED"]
    assert "0.80, at least 0.7" in lines[0]
    assert "0.05, at most 0.1" in lines[3]
    assert "1.40, at least 1.5" in lines[4]  # over the best of them
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"parts": found}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gpu_figures.py", str(path)])
        figures.main()
    assert capsys.readouterr().out.count("holds") == 3


def test_the_committed_shapes_of_other_benchmarks(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of this version's and of older ones."""
    for path in sorted((repository / "benchmarks" / "results").glob("*.json")):
        figures.print_part({"status": 0, "result": json.loads(path.read_text())})
    said = capsys.readouterr().out
    assert "times its speed" in said
    assert "of floor" in said
    assert "cannot be shown" not in said


def test_figures_that_are_not_there_stop_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    figures.print_part({"status": 0, "result": document(plan={})})
    figures.print_part({"status": 0, "result": {"benchmark": "gpu_kernels"}})
    figures.print_targets({"resident": {"status": 0, "result": {"benchmark": "resident"}}})
    assert capsys.readouterr().out.count("cannot be shown") == 2
