"""Is converting a model bound by the disk, and where does its time go?

Method. A checkpoint of random weights with the true widths of Mixtral 8x7B and a few layers is converted to
an NF4 expert file on the same disk, again and again. Just before each conversion, the floor is measured, so
that drifts of the disk's speed affect both alike. The first round warms up and does not count.
  floor   the same disk traffic and nothing else: every expert's bytes are read while as many zeros are
          written as the expert file has bytes; both past the page cache, as in a conversion
  alone   the floor's two halves, reading and writing, one after the other
  ratio   conversion over floor in the same round, the median with its 95 % interval (ratio.py); 1 would mean
          that nothing but the disk takes time
  busy    seconds that each stage of a conversion was at work. Reading, encoding and writing overlap, so they
          add up to more than the whole. Writing includes the checksums, and the wait for the disk at the end
          of each layer, most of which is `sync`.
The disk, or the host behind a virtual disk, may have a cache of its own; the floor profits from it as much.

Run: python benchmarks/conversion.py [--synthetic mixtral-8x7b] [--layers 2] [--rounds 6] [--json FILE]
--synthetic writes its checkpoint below MOE_LOCAL_HOME and keeps it; the expert files beside it are removed.
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from decode import write_synthetic
from ratio import Ratio
from report import finish, parser_of, versions
from synthetic import NAMED_SHAPES

from moe_local.cache.keys import format_bytes
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.expert_file import expert_shard
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.expert_shard import ShardWriter
from moe_local.offload.plan.bandwidth import machine
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.nf4 import NF4Codec
from moe_local.offload.system.direct_io import Range, page_memory, read_ranges
from moe_local.offload.system.pages import PAGE, open_for_writing, write_fully

AT_ONCE = 256 << 20
"""Bytes of a shard that the floor reads at once: as many as an expert's largest matrix has in fp32."""

STAGES = ("read", "encode", "write", "checksum", "sync")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    folder = write_synthetic(options.synthetic, options.layers)
    checkpoint = Checkpoint.open(folder)
    out = folder.with_name(folder.name + "-converted")
    bitsandbytes_ops()
    rounds = []
    try:
        for number in range(options.rounds + 1):
            found = one_round(checkpoint, out)
            if number:
                rounds.append(found)
            print(f"round {number} of {options.rounds}: {found['seconds']:.2f} s", file=sys.stderr)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        out.with_name(out.name + ".lock").unlink(missing_ok=True)
    report(options, checkpoint, rounds)


def one_round(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    """Run the floor, then a conversion; returns the seconds of both and of the conversion's stages."""
    parts = expert_parts(checkpoint)
    nbytes_read = sum(nbytes for _, _, nbytes in parts)
    nbytes_written = sum(plan_bytes(checkpoint))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    floor, alone = disk_floor(parts, out / "floor", nbytes_written)
    shutil.rmtree(out)
    with stopwatch() as busy:
        start, cpu = time.perf_counter(), time.process_time()
        file = convert_experts(checkpoint, codec_for("nf4"), out)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert file.total_bytes == nbytes_written
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "floor_seconds": floor,
        "alone_seconds": alone,
        "busy_seconds": {stage: busy[stage] for stage in STAGES},
        "bytes_read": nbytes_read,
        "bytes_written": nbytes_written,
    }


def expert_parts(checkpoint: Checkpoint) -> list[tuple[Path, int, int]]:
    """(file, start, bytes) of every stored expert tensor, in file order."""
    found = [
        (checkpoint.folder / tensor.shard, tensor.start, tensor.nbytes)
        for tensor in checkpoint.shards.tensors.values()
        if ".experts." in tensor.key
    ]
    return sorted(found)


def plan_bytes(checkpoint: Checkpoint) -> Iterator[int]:
    """The size in bytes of each encoded expert."""
    codec = codec_for("nf4")
    for layer in checkpoint.spec.layers:
        nbytes = codec.layout(layer.tensors).nbytes
        yield from [nbytes] * layer.num_experts


def disk_floor(
    parts: Sequence[tuple[Path, int, int]], target: Path, nbytes: int
) -> tuple[float, dict[str, float]]:
    """Seconds of reading the parts while writing `nbytes` to `target`; and of reading and writing alone."""
    memory = page_memory(AT_ONCE + PAGE)
    zeros = page_memory(64 << 20).zero_()
    memory.zero_()

    def read() -> None:
        for path, start, size in parts:
            for done in range(0, size, AT_ONCE):
                place = memory[start % PAGE :][: min(AT_ONCE, size - done)]
                read_ranges([Range(path, start + done, place)])

    def write() -> None:
        file = open_for_writing(target)
        try:
            for done in range(0, nbytes, zeros.numel()):
                write_fully(file, zeros[: min(zeros.numel(), nbytes - done)].numpy().data)
            os.fsync(file)
        finally:
            os.close(file)

    def timed(*works: Callable[[], None]) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(len(works)) as pool:
            for done in [pool.submit(work) for work in works]:
                done.result()
        return time.perf_counter() - start

    return timed(read, write), {"read": timed(read), "write": timed(write)}


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Yields the seconds that each stage is at work inside the block, by stage."""
    busy: dict[str, float] = defaultdict(float)

    def counted(function: Callable[..., Any], *stages: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                for stage in stages:
                    busy[stage] += time.perf_counter() - start

        return run

    with ExitStack() as patches:
        for owner, name, stage in (
            (Checkpoint, "read_expert", "read"),
            (NF4Codec, "encode", "encode"),
            (ShardWriter, "add", "write"),
            (ShardWriter, "finish", "write"),
            (expert_shard.xxhash, "xxh3_64_intdigest", "checksum"),
            (expert_shard.os, "fsync", "sync"),
        ):
            patches.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name), stage)))
        yield busy


def report(options: argparse.Namespace, checkpoint: Checkpoint, rounds: Sequence[dict[str, Any]]) -> None:
    def median(pick: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(pick(found) for found in rounds)

    seconds = [found["seconds"] for found in rounds]
    ratio = Ratio.of(seconds, [found["floor_seconds"] for found in rounds])
    read, written = rounds[0]["bytes_read"], rounds[0]["bytes_written"]
    experts = sum(layer.num_experts for layer in checkpoint.spec.layers)
    print(f"{options.synthetic}, {len(checkpoint.spec.layers)} layers, {experts} experts")
    print(f"{format_bytes(read)} read, {format_bytes(written)} written")
    print(f"conversion  {median(lambda r: r['seconds']):.2f} s ({min(seconds):.2f}, {max(seconds):.2f})")
    print(f"floor       {median(lambda r: r['floor_seconds']):.2f} s")
    for name, nbytes in (("read", read), ("write", written)):
        alone = median(lambda r, name=name: r["alone_seconds"][name])
        print(f"{name:5} alone {alone:.2f} s, {nbytes / alone / 1e9:.2f} GB/s")
    print(f"conversion over floor {ratio}")
    for stage in STAGES:
        print(f"busy {stage:9}{median(lambda r, stage=stage: r['busy_seconds'][stage]):.2f} s")
    print(f"CPU time {median(lambda r: r['cpu_seconds']):.2f} s on {os.cpu_count()} cores")
    document = {
        "machine": machine(),
        **versions(),
        "threads": torch.get_num_threads(),
        "model": options.synthetic,
        "layers": len(checkpoint.spec.layers),
        "experts": experts,
        "conversion_over_floor": ratio.to_dict(),
        "rounds": list(rounds),
    }
    finish(document, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=6)
    parser.add_argument("--synthetic", choices=NAMED_SHAPES, default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=2)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
