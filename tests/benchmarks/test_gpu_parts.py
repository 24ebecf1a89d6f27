"""gpu_parts.py: one time for all parts, nothing lost that was measured, the next call runs the rest."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import gpu_parts
import pytest


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu_parts, "GRACE_S", 1)
    return gpu_parts


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def told(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())["parts"]
    return found


def test_what_each_part_said_is_kept(parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "gpu.json"
    asked = tmp_path / "asked"
    count = f"open({str(asked)!r}, 'a').write('.'); "
    given = [
        parts.Part("good", 0, 60, python(count + "print('words'); print('{\"a\": 1}')")),
        parts.Part(
            "bad", 0, 60, python(count + "import os; raise SystemExit(os.environ['WHY'])"), {"WHY": "no luck"}
        ),
        parts.Part("plain", 0, 60, python("print('3 passed')")),
    ]
    parts.main([str(out)], given)
    found = told(out)
    assert found["good"] == {"status": 0, "seconds": found["good"]["seconds"], "result": {"a": 1}}
    assert (found["bad"]["status"], found["bad"]["errors"]) == (1, ["no luck"])
    assert found["plain"]["result"] == {"output": ["3 passed"]}
    said = capsys.readouterr().out
    assert "status 0" in said
    assert "status 1" in said
    # a second call runs what failed, a third with --again everything
    parts.main([str(out)], given)
    assert asked.read_text() == "..."
    assert told(out)["good"] == found["good"]
    parts.main([str(out), "--again"], given)
    assert asked.read_text() == "....."
    parts.main([str(out), "--again", "--only", "good"], given)
    assert asked.read_text() == "......"
    assert set(told(out)) == {"good", "bad", "plain"}


@pytest.mark.slow
def test_there_is_one_time_for_all(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that hangs, and lets nobody end its own children, is killed; later ones are named.

    By a clock that stands still but for the part that hangs: Python's start may take any time.
    """
    real, now, limits = parts.run, 0.0, {}

    def run(part: Any, limit_s: float) -> dict[str, Any]:
        nonlocal now
        limits[part.name] = limit_s
        entry: dict[str, Any] = real(part, limit_s if part.name == "hanging" else 200)
        if part.name == "hanging":
            now += limit_s + parts.GRACE_S
        return entry

    monkeypatch.setattr(parts, "run", run)
    monkeypatch.setattr(parts, "time", SimpleNamespace(monotonic=lambda: now))
    out = tmp_path / "gpu.json"
    hanging = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    )
    given = [
        parts.Part("quick", 0, 60, python("print(1)")),
        parts.Part("hanging", 0, 600, python(hanging)),
        parts.Part("late", 0, 60, python("print(2)")),
    ]
    parts.main([str(out), "--limit", "2"], given)
    assert limits == {"quick": 1, "hanging": 1}
    found = told(out)
    assert [found[name]["status"] for name in ("quick", "hanging", "late")] == [0, 124, None]
    parts.main([str(out), "--limit", "60", "--only", "late"], given)
    assert limits["late"] == 59
    assert told(out)["late"] == {"status": 0, "seconds": 0, "result": 2}


def test_a_part_that_does_not_fit_gives_way_to_one_that_does(
    parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    given = [parts.Part("long", 90, 100, python("print(1)")), parts.Part("short", 9, 60, python("print(2)"))]
    parts.main([str(out), "--limit", "60"], given)
    assert [told(out)[name]["status"] for name in ("long", "short")] == [None, 0]
    said = capsys.readouterr().out
    assert said.index("for the next call with the same OUT: long\n") < said.index("== short")
    parts.main([str(out), "--limit", "200"], given)
    assert told(out)["long"]["status"] == 0


def test_what_failed_comes_after_what_has_not_run(parts: Any, tmp_path: Path) -> None:
    given = [parts.Part(name, 0, 60, python("print(1)")) for name in ("failed", "ended", "cut", "new")]
    found = {name: {"status": status} for name, status in (("failed", 1), ("ended", 0), ("cut", 124))}
    names = [part.name for part in parts.to_run(given, found, [], again=False)]
    assert names == ["cut", "new", "failed"]
    assert [part.name for part in parts.to_run(given, found, ["ended"], again=True)] == ["ended"]


def test_what_a_part_needs_is_run_in_each_call(parts: Any) -> None:
    every = [
        parts.Part("first", 0, 60, []),
        parts.Part("made", 0, 60, []),
        parts.Part("measured", 0, 60, [], after="made"),
    ]
    ended = {name: {"status": 0} for name in ("first", "made")}
    assert [part.name for part in parts.to_run(every, ended, [], again=False)] == ["made", "measured"]
    assert [part.name for part in parts.to_run(every, {}, ["measured"], again=False)] == ["made", "measured"]
    ended["measured"] = {"status": 0}
    assert parts.to_run(every, ended, [], again=False) == []


def test_a_command_that_is_not_there_stops_nothing(parts: Any, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    given = [
        parts.Part("absent", 0, 60, [str(tmp_path / "nothing")]),
        parts.Part("next", 0, 60, python("print(1)")),
    ]
    parts.main([str(out)], given)
    found = told(out)
    assert (found["absent"]["status"], found["next"]["status"]) == (127, 0)
    assert "No such file" in found["absent"]["errors"][-1]


def test_what_holds_no_parts_is_refused(parts: Any, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    out.write_text("[]")
    with pytest.raises(SystemExit, match=r"holds no parts .*; name another file"):
        parts.main([str(out)], [])
    assert out.read_text() == "[]"


@pytest.mark.parametrize("name", ["parts_of", "peer_parts"])
def test_the_parts_are_what_they_say(parts: Any, repository: Path, tmp_path: Path, name: str) -> None:
    """Each script takes its arguments, and `moe-local bench` its own."""
    bench = importlib.import_module("moe_local.cli.bench").bench
    main = importlib.import_module("moe_local.cli.main").main
    every = parts.parts_of(4, tmp_path) if name == "parts_of" else parts.peer_parts(8)
    assert len({part.name for part in every}) == len(every)
    assert all(part.estimate_s < part.limit_s for part in every)
    assert {part.after for part in every} <= {None, "weights"}
    assert all(part.after for part in every if "--synthetic" in part.command)
    for part in every:
        if "bench" in part.command:
            arguments = list(part.command[part.command.index("bench") + 1 :])
            # click keeps a command's help option as it is first asked for, with the names of the parent's
            bench.make_context("bench", arguments, parent=click.Context(main, **main.context_settings))
        elif "pytest" in part.command:
            assert (repository / part.command[-1]).is_dir()
        else:
            path = Path(part.command[1]).relative_to(repository / "benchmarks")
            module = importlib.import_module(".".join(path.with_suffix("").parts))
            if hasattr(module, "parse"):
                module.parse(list(part.command[2:]))


def test_one_call_has_time_for_the_targets_and_three_for_all(parts: Any, tmp_path: Path) -> None:
    every = parts.parts_of(32, tmp_path)
    targets = ("weights", "mixtral_recorded", "mixtral_recorded_25GBs", "resident", "qwen3_half_by_host")
    last = max(number for number, part in enumerate(every) if part.name in targets)
    assert sum(part.estimate_s for part in every[: last + 1]) < 530 - parts.GRACE_S
    again = next(part.estimate_s for part in every if part.name == "weights")
    assert sum(part.estimate_s for part in every) + 2 * again < 3 * (530 - parts.GRACE_S)
    assert sum(part.estimate_s for part in parts.peer_parts(8)) < 530 - parts.GRACE_S


def test_an_unknown_part_is_refused(parts: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--only nothing is no part; there are kernels, weights"):
        parts.main([str(tmp_path / "gpu.json"), "--only", "nothing"])


ONLY = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {absent}:
            raise ModuleNotFoundError("not on this machine: " + name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["moe-local", "bench", "demo", "--device", "cpu", "--slots", "4", "--workload", "single",
            "--tokens", "2", "--repeats", "1", "--json"]
runpy.run_module("moe_local", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_measurement_needs_no_more_than_the_readme_says(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the package depends on, the rest is not to be had."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    needs = {re.split(r"[<>=]", text)[0] for text in project["dependencies"]}
    text = " ".join((repository / "benchmarks" / "README.md").read_text().split())
    listed = (
        text.partition("and moe-local itself (`pip wheel --no-deps .`): ")[2].partition(";")[0].split(", ")
    )
    assert {"xxhash", "bitsandbytes"} < set(listed) < needs
    rest = sorted(needs - {*listed, "torch", "transformers", "h11"})  # h11: also what the Hub's client uses
    assert "fastapi" in rest
    absent = {name.replace("-", "_") for name in rest}
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
    ran = subprocess.run(python(ONLY.replace("{absent}", repr(absent))), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout)["benchmark"] == "latency"
