"""Run the parts of gpu.sh within one time limit and keep each one's output, even if others fail.

Each part is a command whose output, or its last line, is a JSON document. A part has its own time-out, and
all together have --limit seconds: a part whose estimate exceeds the time left is reported, and a later call
with the same OUT runs it. Parts that succeeded are not run again unless --again; those that failed come last.
OUT is written after every part, so a call that is killed keeps what was measured. For a part that fails, the
end of its errors is recorded, and the next part runs. Figures are printed after each part (gpu_figures.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_figures import print_part, print_targets

import moe_local
from moe_local.cache.files import write_atomically
from moe_local.offload.system.home import moe_local_home

HERE = Path(__file__).resolve().parent
GRACE_S = 20
"""Seconds from a part's SIGINT until it is killed."""
LINES = 60
"""Last lines that are kept of a part's errors, and of its output if that is not JSON."""
PYTHON = sys.executable


@dataclass(frozen=True, slots=True)
class Part:
    """One command. `estimate_s`: its seconds on an H200, which must be left for it to begin. `after`: a part
    that every call runs before this one, since the files that it makes may be gone since an earlier call."""

    name: str
    estimate_s: int
    limit_s: int
    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    after: str | None = None


def script(name: str, *arguments: str) -> list[str]:
    return [PYTHON, str(HERE / name), *arguments]


def bench(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "moe_local", "bench", "--json", "--context", "4096", "--vram", "24GiB", *arguments]


def parts_of(layers: int, routes: Path | None) -> list[Part]:
    """The parts, the most informative first. `layers`: those of Mixtral; `routes`: a folder of recorded
    routes."""
    demo = str(moe_local_home() / "benchmarks" / "demo_routes.csv")
    made = [f"mixtral-8x7b:{layers}", "qwen3-30b-a3b:48", "qwen3.6-35b-a3b:12"]

    def mixtral(*arguments: str) -> list[str]:
        shape = ("--synthetic", "mixtral-8x7b", "--layers", str(layers))
        return bench(*shape, "--tokens", "32", *arguments)

    def recorded(*arguments: str) -> list[str]:
        return mixtral("--workload", "single", "--routes", demo, *arguments)

    def qwen(*arguments: str) -> list[str]:
        shape = ("--synthetic", "qwen3-30b-a3b", "--layers", "48")
        return bench(*shape, "--workload", "single", *arguments)

    def half(*arguments: str) -> list[str]:
        return qwen("--slots", "64", "--tokens", "48", *arguments)

    def states(*arguments: str) -> list[str]:
        return bench("--synthetic", "qwen3.6-35b-a3b", "--layers", "12", "--workload", "single", *arguments)

    slow_link = {"MOE_LOCAL_LINK_LIMIT": "25GB"}
    no_graphs = {"MOE_LOCAL_GRAPHS": "off"}
    by_device, by_host = {"MOE_LOCAL_DEVICE_MISSES": "on"}, {"MOE_LOCAL_DEVICE_MISSES": "off"}
    tests = ["-o", "addopts=--import-mode=importlib", "-o", "timeout=90", "-p", "no:cacheprovider"]
    three, six = ("--repeats", "3"), ("--repeats", "6")
    resident = ("--tokens", "64")
    parts = [
        Part("kernels", 40, 90, script("gpu_kernels.py")),
        Part("weights", 50, 200, script("gpu_weights.py", *made, "--routes", demo)),
        Part("mixtral_recorded", 75, 150, recorded(*three, "--compare")),
        Part("mixtral_recorded_25GBs", 115, 200, recorded(*three, "--compare"), slow_link),
        Part("resident", 45, 90, script("resident.py", "--vram", "24GiB", "--tokens", "64")),
        Part("qwen3_half_by_host", 40, 90, half(*six), by_host),
        Part("qwen3_half", 80, 150, half(*three, "--compare"), by_device),
        # The tests compile some 200 Triton kernels, at a second each.
        Part(
            "tests", 300, 460, [PYTHON, "-m", "pytest", "-q", "--tb=short", *tests, "-m", "gpu", "tests/gpu"]
        ),
        Part("mixtral", 100, 200, mixtral("--workload", "single,long", *three, "--compare")),
        Part("mixtral_no_graphs", 45, 100, recorded(*three), no_graphs),
        Part("qwen3_resident", 30, 90, qwen(*resident, "--repeats", "6")),
        Part("qwen3_resident_no_graphs", 30, 90, qwen(*resident, *three), no_graphs),
        Part("attention", 20, 60, script("gpu_attention.py")),
        Part(
            "kernels_4_bit_floats",
            25,
            90,
            script("gpu_kernels.py", "--models", "qwen3-30b-a3b", "--formats", "mxfp4", "nvfp4"),
        ),
        Part("device_misses", 20, 60, script("device_misses.py")),
        Part("mixtral_25GBs", 50, 120, mixtral("--workload", "single", *six), slow_link),
        Part("states", 30, 90, states("--tokens", "64", *three)),
        Part("prefill", 60, 150, prefill()),
        Part("encode", 25, 60, script("encode.py", "--dtypes", "bf16", "--rounds", "4")),
    ]
    if routes is not None:
        csv = str(routes / "qwen3-30b-a3b_top6.csv")
        parts.insert(7, Part("qwen3_half_recorded", 40, 90, half("--routes", csv, *six), by_host))
    weights = [part.name for part in parts if "bench" in part.command or part.name == "resident"]
    return [replace(part, after="weights") if part.name in weights else part for part in parts]


def prefill() -> list[str]:
    """The command of the prefill part; few layers, since it holds five models at the same time."""
    shape = ("--made", "mixtral-8x7b", "--layers", "4", "--vram", "24GiB", "--slots", "2", "4")
    return script("prefill.py", *shape, "--prompt-tokens", "512", "2048", "--rounds", "6")


def peer_parts(layers: int) -> list[Part]:
    """The parts that run other engines on the same GPU, with `layers` layers of Mixtral, and VRAM limited in
    proportion: 24 GiB for all of its 32 layers."""
    vram = f"{24 * 1024 * layers // 32}MiB"
    shape = ("--made", "mixtral-8x7b", "--layers", str(layers), "--vram", vram, "--random-peers")
    decode = script("decode.py", *shape, "--activations", "native", "--prefetch", "auto")
    # llama.cpp has no such limit: with 8 layers, it must keep at least one on the CPU to stay within 6 GiB.
    on_cpu = [str(max(1, layers * eighths // 8)) for eighths in (1, 2, 3)]
    return [
        Part("install", 270, 480, script("peers/install.py")),
        Part("transformers", 140, 240, [*decode, "--peer", "transformers", "--tokens", "4", "--rounds", "6"]),
        Part(
            "llama.cpp",
            90,
            240,
            [*decode, "--peer", "llama.cpp", "--n-cpu-moe", *on_cpu, "--tokens", "48", "--rounds", "7"],
        ),
    ]


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] | None = None) -> None:
    options = parse(arguments)
    if parts is None:
        parts = peer_parts(options.layers) if options.peers else parts_of(options.layers, options.routes)
    if unknown := set(options.only) - {part.name for part in parts}:
        names = ", ".join(part.name for part in parts)
        raise SystemExit(f"--only {min(unknown)} is no part; there are {names}")
    found = kept(options.out)
    wanted = to_run(parts, found, options.only, again=options.again)
    announce(wanted, options.limit)
    deadline = time.monotonic() + options.limit
    for part in wanted:
        left = deadline - time.monotonic() - GRACE_S
        if left < part.estimate_s:
            if part.name not in found:
                found[part.name] = {"status": None, "seconds": 0, "errors": ["no time was left for it"]}
            continue
        print(f"== {part.name}, {min(part.limit_s, left):.0f} s at most", flush=True)
        found[part.name] = run(part, min(part.limit_s, left))
        write(options.out, found)
        print_part(found[part.name])
    write(options.out, found)
    for part in parts:
        if entry := found.get(part.name):
            state = "not run" if entry["status"] is None else f"status {entry['status']}"
            print(f"{part.name:26} {state:12} {entry['seconds']:4} s")
    print_targets(found)
    print(options.out)


def to_run(parts: Sequence[Part], found: dict[str, Any], only: Sequence[str], *, again: bool) -> list[Part]:
    """The parts that were asked for and have not succeeded, and the parts that these need. Parts that failed
    other than by their time-out come last."""
    status = {name: entry["status"] for name, entry in found.items()}
    wanted = [part for part in parts if not only or part.name in only]
    if not again:
        wanted = [part for part in wanted if status.get(part.name) != 0]
    needed = {part.after for part in wanted}
    wanted = [part for part in parts if part in wanted or part.name in needed]
    return sorted(wanted, key=lambda part: status.get(part.name) not in (None, 0, 124))


def announce(parts: Sequence[Part], limit_s: float) -> None:
    """Print the parts to run with their times, and those that will probably have to wait for another call."""
    left, later = limit_s - GRACE_S, []
    for part in parts:
        if part.estimate_s > left:
            later.append(part.name)
            continue
        left -= part.estimate_s
        print(f"{part.name:26} about {part.estimate_s:4} s, {part.limit_s:4} at most")
    print(f"{'all':26} about {limit_s - GRACE_S - left:4.0f} s, {limit_s:4.0f} at most")
    if later:
        print(f"for the next call with the same OUT: {', '.join(later)}")
    sys.stdout.flush()


def run(part: Part, limit_s: float) -> dict[str, Any]:
    """Run a part; returns its exit status (124: the time-out, 127: no such command), seconds, result and, if
    it failed, the end of its errors."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            # in its own process group, so that processes that the part started end with it
            process = subprocess.Popen(
                part.command,
                env={**os.environ, **part.env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
            status = wait(process, limit_s)
        except OSError as error:
            print(error, file=errors)
            status = 127
        out.seek(0)
        errors.seek(0)
        said, wrong = out.read(), errors.read().splitlines()[-LINES:]
    entry = {"status": status, "seconds": round(time.monotonic() - began), "result": document(said)}
    if part.env:
        entry["env"] = part.env
    if status:
        entry["errors"] = wrong
    return entry


def wait(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """The exit status; 124 if the time was up and the process was ended. An exception here ends it, too."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        end(process, signal.SIGINT)
        return 124
    except BaseException:
        end(process, signal.SIGKILL)
        raise


def end(process: subprocess.Popen[bytes], first: signal.Signals) -> None:
    for kind in dict.fromkeys((first, signal.SIGKILL)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        try:
            process.wait(GRACE_S)
            return
        except subprocess.TimeoutExpired:  # after SIGKILL: it is stuck in a driver
            continue


def document(said: str) -> Any:
    """All of the output, or its last line, parsed as JSON; if neither is JSON, its last lines."""
    for text in (said, said.rstrip().rpartition("\n")[2]):
        try:
            return json.loads(text)
        except ValueError:
            continue
    return {"output": said.splitlines()[-LINES:]}


def kept(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {}
    try:
        parts: dict[str, Any] = json.loads(out.read_text())["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{out} holds no parts ({error!r}); name another file") from error
    return parts


def write(out: Path, found: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"benchmark": "gpu", "moe_local": moe_local.__version__, "python": platform.python_version()}
    write_atomically(out, [json.dumps({**about, "parts": found}, indent=1), "\n"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="default: results/gpu.json; peers: gpu_peers.json")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all parts; default 530")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--again", action="store_true", help="what OUT has, too")
    parser.add_argument("--peers", action="store_true", help="the parts of gpu_peers.sh")
    parser.add_argument("--layers", type=int, help="of Mixtral; default 32, beside peers 8")
    parser.add_argument("--routes", type=Path, metavar="FOLDER", help="recorded routes")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = HERE / "results" / ("gpu_peers.json" if options.peers else "gpu.json")
    if options.layers is None:
        options.layers = 8 if options.peers else 32
    return options


if __name__ == "__main__":
    main()
