"""Run the parts of gpu.sh within one time and keep what each of them said, whatever becomes of the others.

Each part is a command whose output, or its last line, is a JSON document. A part has a time-out of its own,
and all together have --limit seconds: one that no time is left for is named, and a later call with the same
OUT runs it. Parts that ended well are not run again unless --again. OUT is written after every part, so
that a call that is killed leaves what was measured. A part that fails is recorded with the end of its
errors and stops nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moe_local
from moe_local.cache.files import write_atomically

HERE = Path(__file__).resolve().parent
LEAST_S = 20
"""A part is not begun with less left: it would only load."""
GRACE_S = 20
"""What a part has after its SIGINT before it is killed."""
PYTHON = sys.executable


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    limit_s: int
    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)


def bench(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "moe_local", "bench", "--json", "--context", "4096", "--vram", "24GiB", *arguments]


def parts_of(layers: int, routes: Path | None) -> list[Part]:
    """The most telling ones first. Mixtral has `layers` layers; `routes`: a folder with recorded routes."""

    def mixtral(*arguments: str) -> list[str]:
        shape = ("--synthetic", "mixtral-8x7b", "--layers", str(layers))
        return bench(*shape, "--tokens", "32", *arguments)

    def qwen(*arguments: str) -> list[str]:
        return bench("--synthetic", "qwen3-30b-a3b", "--workload", "single", *arguments)

    def half(*arguments: str) -> list[str]:
        return qwen("--slots", "64", "--tokens", "48", *arguments)

    def states(*arguments: str) -> list[str]:
        return bench("--synthetic", "qwen3.6-35b-a3b", "--layers", "12", *arguments)

    def script(name: str, *arguments: str) -> list[str]:
        return [PYTHON, str(HERE / name), *arguments]

    no_graphs = {"MOE_LOCAL_GRAPHS": "off"}
    by_device, by_host = {"MOE_LOCAL_DEVICE_MISSES": "on"}, {"MOE_LOCAL_DEVICE_MISSES": "off"}
    tests = [PYTHON, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-m", "gpu", "tests/gpu"]
    parts = [
        Part("tests", 240, [*tests, "-p", "no:cacheprovider"]),
        Part("kernels", 60, script("gpu_kernels.py")),
        Part("attention", 30, script("gpu_attention.py")),
        Part("mixtral", 240, mixtral("--workload", "single,long", "--repeats", "3", "--compare")),
        Part("device_misses", 60, script("device_misses.py")),
        Part("qwen3_resident", 100, qwen("--tokens", "64", "--repeats", "4")),
        Part("qwen3_half", 120, half("--repeats", "3", "--compare"), by_device),
        Part("qwen3_half_by_host", 60, half("--repeats", "3"), by_host),
        Part(
            "mixtral_25GBs",
            120,
            mixtral("--workload", "single", "--repeats", "6"),
            {"MOE_LOCAL_LINK_LIMIT": "25GB"},
        ),
        Part("mixtral_no_graphs", 100, mixtral("--workload", "single", "--repeats", "3"), no_graphs),
        Part("qwen3_resident_no_graphs", 80, qwen("--tokens", "64", "--repeats", "3"), no_graphs),
        Part("states", 60, states("--tokens", "64", "--repeats", "3", "--workload", "single")),
        Part("encode", 30, script("encode.py", "--dtypes", "bf16", "--rounds", "6")),
        Part("prefill", 150, ["bash", str(HERE / "gpu_prefill.sh")]),
    ]
    if routes is not None:
        recorded = str(routes / "qwen3-30b-a3b_top6.csv")
        parts.insert(
            7, Part("qwen3_half_recorded", 80, half("--repeats", "4", "--routes", recorded), by_host)
        )
    return parts


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] | None = None) -> None:
    options = parse(arguments)
    parts = parts_of(options.layers, options.routes) if parts is None else parts
    if unknown := set(options.only) - {part.name for part in parts}:
        names = ", ".join(part.name for part in parts)
        raise SystemExit(f"--only {min(unknown)} is no part; there are {names}")
    found = kept(options.out)
    done = set() if options.again else {name for name, entry in found.items() if entry["status"] == 0}
    deadline = time.monotonic() + options.limit
    for part in parts:
        if part.name in done or (options.only and part.name not in options.only):
            continue
        left = deadline - time.monotonic() - GRACE_S
        if left < LEAST_S:
            if part.name not in found:
                found[part.name] = {"status": None, "seconds": 0, "errors": ["no time was left for it"]}
            continue
        print(f"== {part.name}, {min(part.limit_s, left):.0f} s at most", file=sys.stderr, flush=True)
        found[part.name] = run(part, min(part.limit_s, left))
        write(options.out, found)
    write(options.out, found)
    for part in parts:
        if entry := found.get(part.name):
            state = "not run" if entry["status"] is None else f"status {entry['status']}"
            print(f"{part.name:26} {state:12} {entry['seconds']:4} s")
    print(options.out)


def run(part: Part, limit_s: float) -> dict[str, Any]:
    """Its exit status (124: the time-out), seconds, result, and the end of its errors where it failed."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        # a group of its own: what a part has started ends with it
        process = subprocess.Popen(
            part.command,
            env={**os.environ, **part.env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        status = wait(process, limit_s)
        out.seek(0)
        errors.seek(0)
        said, wrong = out.read(), errors.read().splitlines()[-20:]
    print("\n".join(wrong[-6:]), file=sys.stderr, flush=True)
    entry = {"status": status, "seconds": round(time.monotonic() - began), "result": document(said)}
    if part.env:
        entry["env"] = part.env
    if status:
        entry["errors"] = wrong
    return entry


def wait(process: subprocess.Popen[bytes], limit_s: float) -> int:
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        pass
    for kind in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        break
    return 124


def document(said: str) -> Any:
    """All of the output or its last line, as JSON; its last lines where neither is."""
    for text in (said, said.rstrip().rpartition("\n")[2]):
        try:
            return json.loads(text)
        except ValueError:
            continue
    return {"output": said.splitlines()[-20:]}


def kept(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {}
    parts: dict[str, Any] = json.loads(out.read_text())["parts"]
    return parts


def write(out: Path, found: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"benchmark": "gpu", "moe_local": moe_local.__version__, "python": platform.python_version()}
    write_atomically(out, [json.dumps({**about, "parts": found}, indent=1), "\n"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all parts; default 530")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--again", action="store_true", help="what OUT has, too")
    parser.add_argument("--layers", type=int, default=32, help="of Mixtral; default 32")
    parser.add_argument("--routes", type=Path, metavar="FOLDER", help="recorded routes")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
