"""How fast are tokens where RAM holds a part of the experts only, beside what else reads them from disk?

Method. Every contender runs in its own process, whose memory, page cache included, is limited by a control
group (memory_group.py): ours with `prefetch` auto and off, which plans its RAM by the limit that it finds;
llama.cpp with the model mapped, Q4_0; transformers with accelerate's disk offload, bf16, which may fill the
limit except for --spare. Before each run all files of the model are dropped from the page cache. A run loads
the model, reads a prompt and generates greedily; the contender that begins changes from round to round.
Before and after each run the disk is read sequentially, past the page cache, in 4 MiB requests, 8 in flight.
  ms/token  from the first new id to the last; the median over rounds, with the lowest and highest
  MB read   by the process per token, as the system counts it, mapped files included
  floor     those bytes over the sequential bandwidth of the run: the time if everything else cost nothing
  reads     bytes / time in which some read of an expert was in flight, over the sequential bandwidth (ours)
  ratio     tokens per second of ours over the peer's, in the same round: the median, lowest and highest
A contender that the limit kills is reported and not run again. With --runs FILE finished runs are kept, and
an interrupted benchmark continues where it stopped; --once makes one run and stops.

Run: python benchmarks/disk.py [--layers 4] [--limit 8GiB 2.2GiB 1.5GiB] [--rounds 3] [--runs FILE]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from contenders import spread
from decode import write_synthetic
from memory_group import forget, in_page_cache, memory_group
from peers import client, install
from peers.client import Peer
from ratio import Ratio
from report import finish, parser_of

from moe_local.cache.files import write_atomically
from moe_local.cache.keys import format_bytes, parse_bytes
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.load import open_experts
from moe_local.offload.plan import bandwidth
from moe_local.offload.system.direct_io import PIECE, page_memory
from moe_local.offload.system.home import moe_local_home
from moe_local.offload.system.pages import PAGE

HERE = Path(__file__).resolve().parent
DEPTH = 8
OURS = ("ours", "ours without prefetch")
PEERS = ("llama.cpp", "accelerate")
CONTENDERS = (*OURS, *PEERS)


class Model(NamedTuple):
    """The files of one model in the form that each contender reads."""

    checkpoint: Path
    shards: list[Path]
    gguf: Path
    experts: list[Path]

    @property
    def files(self) -> list[Path]:
        return [*self.shards, self.gguf, *self.experts]


class Run(NamedTuple):
    """The key of one run: each contender runs once per limit and round."""

    limit: str
    round: int
    contender: str


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    model = prepare(options)
    wanted = [
        Run(limit, number, contender)
        for number in range(options.rounds)
        for limit in options.limit
        for contender in in_turn(options.contender, number)
        if contender != "accelerate" or number < options.accelerate_rounds
    ]
    done = read_runs(options.runs)
    for run in wanted:
        if run in done or gave_up(done, run):
            continue
        done[run] = measure(model, run, options)
        print(f"{run.contender} in {run.limit}, round {run.round}: {words(done[run])}", file=sys.stderr)
        if options.runs:
            keep_runs(options.runs, done)
        if options.once:
            return
    report(options, {run: done[run] for run in wanted if run in done})


def in_turn(contenders: Sequence[str], number: int) -> list[str]:
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def prepare(options: argparse.Namespace) -> Model:
    """Make, unless they exist, the checkpoint, the experts, the GGUF file and llama.cpp's environment."""
    checkpoint = Checkpoint.open(write_synthetic(options.synthetic, options.layers))
    experts = open_experts(checkpoint, "nf4")
    python = str(install.install(install.default_folder()))
    gguf = client.gguf_of(checkpoint.folder, checkpoint.fingerprint, python)
    return Model(
        checkpoint.folder,
        sorted(checkpoint.folder.glob("*.safetensors")),
        gguf,
        sorted(experts.folder.glob("*.safetensors")),
    )


def measure(model: Model, run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """One run, from a cold start; {"failed": why} if the contender failed."""
    forget(model.files)
    left = in_page_cache(model.files)
    before = sequential_bandwidth(model.experts)
    prompt = [3 + (7 * i + 31 * run.round) % 1000 for i in range(options.prompt_tokens)]
    tokens = options.accelerate_tokens if run.contender == "accelerate" else options.tokens
    with contextlib.ExitStack() as stack:
        limit = None if run.limit == "none" else parse_bytes(run.limit, "--limit")
        prefix = [] if limit is None else stack.enter_context(memory_group(limit))
        command = stack.enter_context(command_of(model, run.contender, limit, options))
        began = time.perf_counter()
        try:
            with Peer([*prefix, *command]) as peer:
                load_s = time.perf_counter() - began
                peer.answer(prompt, tokens, keep=True)
        except SystemExit as error:
            killed = "ended with -9" in str(error)
            why = "killed: out of memory" if killed else " ".join(str(error).splitlines()[-1:])
            return {"failed": why}
    after = sequential_bandwidth(model.experts)
    (answer,) = peer.answers
    return {
        "load_s": load_s,
        "prefill_s": answer.prefill_s,
        "ms_per_token": answer.ms_per_token,
        "tokens": tokens - 1,
        "ids": list(answer.ids),
        "figures": peer.last["figures"],
        "disk_bytes_per_s": [before, after],
        "cached_before": left,
        "hello": {name: peer.hello.get(name) for name in ("name", "version", "detail", "threads", "plan")},
    }


@contextlib.contextmanager
def command_of(
    model: Model, contender: str, limit: int | None, options: argparse.Namespace
) -> Iterator[list[str]]:
    """Yields the command that starts a contender; files that it offloads to disk are removed afterwards."""
    peers, context = HERE / "peers", str(options.context)
    if contender in OURS:
        prefetch = "auto" if contender == "ours" else "off"
        yield [
            sys.executable, str(peers / "ours_peer.py"), str(model.checkpoint),
            "--context", context, "--dense", options.dense, "--prefetch", prefetch,
        ]  # fmt: skip
    elif contender == "llama.cpp":
        python = str(install.install(install.default_folder()))
        yield [python, str(peers / "llama_cpp_peer.py"), str(model.gguf), "--context", context, "--mapped"]
    else:
        room = 1 << 50 if limit is None else max(1, limit - parse_bytes(options.spare, "--spare"))
        folder = moe_local_home() / "benchmarks" / "accelerate-offload"
        try:
            yield [
                sys.executable, str(peers / "transformers_peer.py"), str(model.checkpoint),
                "--ram", str(room), "--offload", str(folder),
            ]  # fmt: skip
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sequential_bandwidth(files: Sequence[Path], nbytes: int = 384 << 20) -> float:
    """Bytes/s of reading consecutive pieces of one of the files past the page cache, DEPTH in flight.

    Reads into large pages, as slots have them: small pages scatter a request over a thousand addresses, which
    some disks treat as that many requests. If direct I/O is refused, reads go through the page cache, which
    was emptied.
    """
    path = random.choice([path for path in files if path.stat().st_size > PIECE * DEPTH] or list(files))
    piece = min(PIECE, path.stat().st_size // PAGE * PAGE)
    length = min(path.stat().st_size // piece * piece, nbytes)
    memory = page_memory(DEPTH * piece).zero_()
    buffers = [memory[i * piece : (i + 1) * piece].numpy().data for i in range(DEPTH)]
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        file = os.open(path, os.O_RDONLY)

    def read(worker: int) -> None:
        for offset in range(worker * piece, length, DEPTH * piece):
            os.preadv(file, [buffers[worker]], offset)

    with ThreadPoolExecutor(DEPTH) as pool:
        list(pool.map(read, range(DEPTH)))  # warms up: starts the threads and touches the memory
        start = time.perf_counter()
        list(pool.map(read, range(DEPTH)))
        seconds = time.perf_counter() - start
    os.close(file)
    return length / seconds


def gave_up(done: dict[Run, dict[str, Any]], run: Run) -> bool:
    """Whether this contender has already failed at this limit."""
    return any(
        "failed" in record and (other.limit, other.contender) == (run.limit, run.contender)
        for other, record in done.items()
    )


def read_runs(path: str | None) -> dict[Run, dict[str, Any]]:
    if path is None or not Path(path).exists():
        return {}
    return {Run(**record.pop("run")): record for record in json.loads(Path(path).read_text())}


def keep_runs(path: str, done: dict[Run, dict[str, Any]]) -> None:
    records = [{"run": run._asdict(), **record} for run, record in done.items()]
    write_atomically(Path(path), [json.dumps(records, indent=1), "\n"])


def words(record: dict[str, Any]) -> str:
    return record.get("failed") or f"{record['ms_per_token']:.0f} ms a token"


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one contender at one limit."""
    finished = [record for record in records if "failed" not in record]
    if not finished:
        return {"failed": records[0]["failed"]}
    disk = [statistics.fmean(record["disk_bytes_per_s"]) for record in finished]
    per_token = [record["figures"]["read_bytes"] / record["tokens"] for record in finished]
    floors = [1000 * read / rate for read, rate in zip(per_token, disk, strict=True)]
    ms = [record["ms_per_token"] for record in finished]
    row: dict[str, Any] = {
        "ms_per_token": spread(ms),
        "tokens_per_s": 1000 / statistics.median(ms),
        "read_bytes_per_token": statistics.median(per_token),
        "floor_ms_per_token": statistics.median(floors),
        "share_of_floor": statistics.median(f / m for f, m in zip(floors, ms, strict=True)),
        "disk_bytes_per_s": spread(disk),
        "load_s": spread([record["load_s"] for record in finished]),
        "prefill_s": spread([record["prefill_s"] for record in finished]),
        "about": finished[0]["hello"],
    }
    if reading := [r for r in finished if r["figures"].get("reading_s")]:
        counts = [record["figures"] for record in reading]
        rates = [f["expert_bytes"] / f["reading_s"] for f in counts]
        row["reads_over_sequential"] = spread(
            [rate / statistics.fmean(r["disk_bytes_per_s"]) for rate, r in zip(rates, reading, strict=True)]
        )
        row["hit_rate"] = sum(f["hits"] for f in counts) / sum(f["hits"] + f["misses"] for f in counts)
        row["stall_ms_per_token"] = statistics.median(
            1000 * record["figures"]["stall_s"] / record["tokens"] for record in reading
        )
    return row


def ratios(runs: dict[Run, dict[str, Any]], limit: str) -> Iterator[dict[str, Any]]:
    """Tokens per second of ours over each other contender's, in the rounds that both finished."""
    names = dict.fromkeys(run.contender for run in runs if run.limit == limit)
    for other in names:
        if other == "ours" or "ours" not in names:
            continue
        mine, theirs = (
            {run.round: record["ms_per_token"] for run, record in runs.items()
             if (run.limit, run.contender) == (limit, name) and "failed" not in record}
            for name in ("ours", other)
        )  # fmt: skip
        both = sorted(mine.keys() & theirs.keys())
        if both:
            each = [theirs[number] / mine[number] for number in both]
            ratio = Ratio.of([1 / mine[n] for n in both], [1 / theirs[n] for n in both])
            yield {"limit": limit, "ours": "ours", "peer": other, **ratio.to_dict(), **extremes(each)}


def extremes(each: Sequence[float]) -> dict[str, float]:
    return {"lowest": min(each), "highest": max(each)}


def check_equal(runs: dict[Run, dict[str, Any]]) -> None:
    """Raise SystemExit unless our ids are the same for every limit, with and without prefetch."""
    by_round: dict[int, list[int]] = {}
    for run, record in runs.items():
        if run.contender not in OURS or "failed" in record:
            continue
        if by_round.setdefault(run.round, record["ids"]) != record["ids"]:
            raise SystemExit(f"ids of {run.contender} in {run.limit} differ, round {run.round}")


def report(options: argparse.Namespace, runs: dict[Run, dict[str, Any]]) -> None:
    check_equal(runs)
    rows, compared = [], []
    for limit in options.limit:
        print(f"{limit} of memory")
        print(
            f"{'':22} {'tok/s':>6} {'ms/token':>8} {'min':>6} {'max':>6} {'MB read':>7} {'floor':>6} "
            f"{'share':>5} {'reads':>5} {'hits':>4} {'load s':>6}"
        )
        for contender in options.contender:
            records = [r for run, r in runs.items() if (run.limit, run.contender) == (limit, contender)]
            if records:
                row = {"limit": limit, "contender": contender, **summary(records)}
                rows.append(row)
                print_row(row)
        for ratio in ratios(runs, limit):
            compared.append(ratio)
            print(
                f"ours / {ratio['peer']}: {ratio['median']:.2f} "
                f"({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
            )
    result = {
        "benchmark": "disk",
        "model": f"{options.synthetic}, {options.layers} layers",
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "dense": options.dense,
        "rows": rows,
        "ratios": compared,
        "machine": bandwidth.machine(),
    }
    finish(result, options.json)


def print_row(row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{row['contender']:22} {row['failed']}")
        return
    ms = row["ms_per_token"]
    reads = row.get("reads_over_sequential")
    ours = f" {reads['median']:5.2f} {row['hit_rate']:4.0%}" if reads else " " * 11
    print(
        f"{row['contender']:22} {row['tokens_per_s']:6.2f} {ms['median']:8.0f} {ms['min']:6.0f} "
        f"{ms['max']:6.0f} {row['read_bytes_per_token'] / 1e6:7.0f} {row['floor_ms_per_token']:6.0f} "
        f"{row['share_of_floor']:5.0%}{ours} {row['load_s']['median']:6.1f}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--synthetic", default="mixtral-8x7b", help="shape of the model of random weights")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--limit", nargs="+", default=["8GiB", "2.2GiB", "1.5GiB"], help="of memory; none: the machine's"
    )
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--dense", default="nf4", help="of ours; default nf4, as llama.cpp has it")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--accelerate-tokens", type=int, default=3, help="its tokens take many seconds each")
    parser.add_argument("--accelerate-rounds", type=int, default=1)
    parser.add_argument("--spare", default="1GiB", help="of the limit, what accelerate's weights leave free")
    parser.add_argument(
        "--runs", metavar="FILE", help="keeps finished runs; an interrupted benchmark goes on"
    )
    parser.add_argument("--once", action="store_true", help="make one run that is missing and stop")
    options = parser.parse_args(arguments)
    for limit in options.limit:
        if limit != "none":
            format_bytes(parse_bytes(limit, "--limit"))
    if min(options.tokens, options.accelerate_tokens) < 2 or options.rounds < 1:
        parser.error("use --tokens 2, --accelerate-tokens 2 and --rounds 1 at least")
    if options.once and not options.runs:
        parser.error("--once needs --runs FILE, or every call would begin anew")
    return options


if __name__ == "__main__":
    main()
