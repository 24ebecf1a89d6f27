"""How fast is an expert's matrix encoded to NF4, beside bitsandbytes and beside what the memory allows?

Method. A matrix of random weights, by default one of Mixtral 8x7B's, 14336 x 4096, in each dtype. In each
round all contenders encode it in turn; the one that begins changes. The first round warms up and does not
count.
  avx512 ...     this package's codec with each instruction set of the C++ library that this processor has:
                 blocks and double-quantized scales, all that an expert file holds
  torch          the same codec without the compiled library
  cuda           the same codec on a GPU, if there is one, copies to and from it included
  bitsandbytes   functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
  read           summing 256 MiB with all threads: the bandwidth of memory for reading alone
  blocks         quantizing only the blocks, with the best instruction set; the rest of the time goes to the
                 scales
All must give the same bytes. ms: the median over rounds, with the lowest and highest; GB/s of weights read;
times faster: than bitsandbytes in the same round, the median with its 95 % interval (ratio.py). All use as
many threads as torch.

Run: python benchmarks/encode.py [--rows 14336] [--cols 4096] [--dtypes bf16 fp32] [--rounds 9] [--json FILE]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from ratio import Ratio
from report import finish, parser_of, versions

from moe_local.offload.native.library import ISAS, check, library
from moe_local.offload.plan.bandwidth import machine
from moe_local.offload.quantize import nf4_blocks
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.layout import TensorSpec
from moe_local.offload.quantize.nf4 import NF4Codec, nf4_matrix

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
READ_BYTES = 256 << 20

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
"""Weights -> q, absmax, absmax_scale, offset."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    bitsandbytes_ops()
    try:
        tables = {name: measure(options, DTYPES[name]) for name in options.dtypes}
    finally:
        if (compiled := library()) is not None:
            check(compiled.moe_set_isa(compiled.moe_best_isa()))
    document = {
        "machine": machine(),
        **versions(),
        "threads": torch.get_num_threads(),
        "rows": options.rows,
        "cols": options.cols,
        "rounds": options.rounds,
        "dtypes": tables,
    }
    for name, table in tables.items():
        print(f"\n{options.rows} x {options.cols} {name}, {torch.get_num_threads()} threads")
        print_table(table)
    finish(document, options.json)


def measure(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(options.seed)
    weights = (torch.randn(options.rows, options.cols, generator=generator) * 0.02).to(dtype)
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    contenders: dict[str, Callable[[], object]] = {
        name: lambda encode=encode: encode(weights) for name, encode in encoders(weights).items()
    }
    check_equal(weights)
    contenders["read"] = memory.sum
    if library() is not None:
        contenders["blocks"] = blocks(weights)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(options.rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            contenders[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
        print(f"{dtype} round {number} of {options.rounds}", file=sys.stderr)
    return {
        name: summary(
            times,
            READ_BYTES if name == "read" else weights.nbytes,
            None if name in ("read", "blocks", "bitsandbytes") else seconds["bitsandbytes"],
        )
        for name, times in seconds.items()
    }


def encoders(weights: torch.Tensor) -> dict[str, Encode]:
    """All encoders that this machine supports, by name."""
    codec = NF4Codec()
    layout = codec.layout([TensorSpec("w", tuple(weights.shape))])
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)

    def ours(weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codec.encode({"w": weights}, layout, buffer)
        return tuple(nf4_matrix(buffer, layout, "w")[1:])

    def on(isa: int) -> Encode:
        def encode(weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
            check(compiled.moe_set_isa(isa))
            return ours(weights)

        return encode

    def in_torch(weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with mock.patch.object(nf4_blocks, "library", return_value=None):
            return ours(weights)

    found: dict[str, Encode] = {}
    if (compiled := library()) is not None:
        found |= {ISAS[isa]: on(isa) for isa in range(compiled.moe_best_isa(), -1, -1)}
    if torch.cuda.is_available():
        found["cuda"] = lambda weights: ours(weights.cuda())
    return {**found, "torch": in_torch, "bitsandbytes": by_bitsandbytes}


def by_bitsandbytes(weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from bitsandbytes import functional

    q, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=True)
    return q.view(-1), state.absmax, state.state2.absmax, state.offset


def blocks(weights: torch.Tensor) -> Callable[[], object]:
    """A function that only quantizes the blocks, with the best instruction set."""
    q = torch.zeros(-(-weights.numel() // 2), dtype=torch.uint8)
    absmax = torch.zeros(-(-weights.numel() // nf4_blocks.BLOCK))
    compiled = library()

    def run() -> None:
        check(compiled.moe_set_isa(compiled.moe_best_isa()))
        nf4_blocks.quantize_blocks(weights, q, absmax)

    return run


def check_equal(weights: torch.Tensor) -> None:
    """Exit unless all encoders give the same bytes as bitsandbytes."""
    theirs = by_bitsandbytes(weights)
    for name in encoders(weights):
        encode = encoders(weights)[
            name
        ]  # made anew with its own buffer, so that no other encoder's bytes can be in it
        if not all(torch.equal(one, other) for one, other in zip(encode(weights), theirs, strict=True)):
            sys.exit(f"{name} does not encode to the bytes of bitsandbytes")


def summary(times: Sequence[float], nbytes: int, theirs: Sequence[float] | None) -> dict[str, Any]:
    """Figures of one contender that reads `nbytes`."""
    median = statistics.median(times)
    found: dict[str, Any] = {
        "ms": {"median": 1e3 * median, "low": 1e3 * min(times), "high": 1e3 * max(times)},
        "gb_per_s": nbytes / median / 1e9,
    }
    if theirs is not None:
        found["times_faster"] = Ratio.of(theirs, times).to_dict()
    return found


def print_table(table: dict[str, Any]) -> None:
    print(f"{'':14}{'ms':>8}  {'(low, high)':<19}{'GB/s':>6}   times faster than bitsandbytes")
    for name, row in table.items():
        ms, ratio = row["ms"], row.get("times_faster")
        spread = f"({ms['low']:.1f}, {ms['high']:.1f})"
        print(
            f"{name:14}{ms['median']:8.1f}  {spread:<19}{row['gb_per_s']:6.1f}"
            + (f"   {ratio['median']:.1f}" if ratio else "")
            + (f" ({ratio['low']:.1f} to {ratio['high']:.1f})" if ratio and ratio["low"] is not None else "")
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=9)
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
