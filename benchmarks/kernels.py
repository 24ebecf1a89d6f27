"""How near does the CPU kernel come to the memory's speed, and to torch's on weights that are not quantized?

Method. Every case multiplies with random weights of full width, in copies that are used in turn, so that none
is in the last-level cache when it is used again. A round times all cases in random order, with those of one
kernel and number of tokens together; just before each case, memory is read at full speed, with the same
threads and kind of pages. A case that takes long is timed only in every 2nd, 4th ... round (n: in how many).
Each case's first call warms up, is checked against fp32, and does not count.
  expert       gate, up, activation, down, weighted sum through the product's own path: one token and its
               experts, or more tokens of one expert
  q3 expert, q2 expert, int8 expert, mxfp4 expert, fp8 expert   the same in these formats
  nf4 matrix, int8 matrix   the expert's gate and up alone, as attention and lm_head are multiplied with
  activations  the dtype of the input, fp32 or bf16, or int8 for rounding by the kernel
  torch fp32   the same products with weights dequantized beforehand
  bitsandbytes gemm_4bit; reference: the path without the C++ library
  ms           of a call: median, lowest, highest
  GB/s         of weights and scales, at the median
  of read      GB/s over those of the read just before: the median, and the interval that holds the true
               median with 95 % confidence (ratio.py); best: the fastest call's over the best read of the run
  of NF4       below the table: GB/s over those of the NF4 expert with the same activations in the same round
  x torch      ms over torch fp32's of the same round, likewise; best: of the fastest calls
  error        relative, in the Frobenius norm, against fp32

Targets were set for AVX2. They are compared with the medians over pairs, since other load on the machine
slows both of a pair down; "uncertain" means that the interval reaches across the target.

Run: python benchmarks/kernels.py [--kernels expert] [--isas avx2] [--tokens 1 16] [--rounds 32] [--threads 2]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import moe_local  # noqa: F401 - before torch, so that torch's idle threads do not spin

# isort: split

import torch
from instruction_set import use
from kernel_cases import EXPERT, EXPERTS, KERNELS, PEERS, TORCH, Bench, Case
from kernel_targets import verdicts
from kernel_weights import copies_beyond_cache, last_cache_bytes
from ratio import Ratio
from report import finish, parser_of, versions

from moe_local.offload.native.library import ISAS, library
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.bandwidth import read_sum
from moe_local.offload.tiers.device import HostMemory

READ_BYTES = 128 * 2**20
SLICE_S = 0.25
"""A case that takes longer than this is timed in fewer rounds."""
LEAST_ROUNDS = 6
"""The fewest rounds in which a long case is timed, enough for an interval."""


class Reader:
    """Reads memory that is in no cache, in the same kind of memory as experts."""

    def __init__(self) -> None:
        nbytes = READ_BYTES * copies_beyond_cache(READ_BYTES, least=1)
        self._memory = HostMemory(nbytes)
        self._words = self._memory.tensor.view(torch.int64)
        self._words.fill_(1)
        self._start = 0
        self.rates: list[float] = []

    def rate(self) -> float:
        """Bytes/s of reading the next READ_BYTES; also appended to `rates`."""
        words = self._words[self._start : self._start + READ_BYTES // 8]
        self._start = (self._start + len(words)) % len(self._words)
        start = time.perf_counter()
        total = read_sum(words)
        self.rates.append(words.nbytes / (time.perf_counter() - start))
        assert total == len(words)
        return self.rates[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    load = [os.getloadavg()[0]]
    with torch.inference_mode():
        bench = Bench(options.width, options.hidden, options.tokens, options.experts)
        cases = list(bench.cases(options.kernels, options.isas, options.peers))
        reader = Reader()
        for case in cases:
            warm_up(case, bench, options.rounds)
        for number in range(options.rounds):
            measure_round(cases, reader, number, random.Random(number))
    load.append(os.getloadavg()[0])
    report(options, cases, reader, load)
    return 0


def warm_up(case: Case, bench: Bench, rounds: int) -> None:
    """Check the case's result, and decide in how many rounds it is timed."""
    start = time.perf_counter()
    answer = call(case)
    seconds = time.perf_counter() - start
    wanted = bench.wanted(case)
    case.error = float((answer.float() - wanted).norm() / wanted.norm())
    if not case.error < case.error_limit:
        raise SystemExit(
            f"{case.kernel} by {case.by}, {case.activations}, {case.tokens} tokens: error {case.error:.2g}, "
            f"above {case.error_limit:.2g}; build the library again and run the tests"
        )
    slices = max(1, math.ceil(seconds / SLICE_S))
    # Powers of two, so that of two cases, the more frequent one is timed in all rounds of the other.
    sparsest = 1 << (max(1, rounds // LEAST_ROUNDS).bit_length() - 1)
    case.every = min(1 << (slices - 1).bit_length(), sparsest)


def measure_round(cases: Sequence[Case], reader: Reader, number: int, chance: random.Random) -> None:
    """Time each case that is due in this round once, after a memory read."""
    groups = [list(group) for _, group in groupby(cases, lambda case: (case.kernel, case.tokens))]
    for group in chance.sample(groups, len(groups)):
        for case in chance.sample(group, len(group)):
            if number % case.every == 0:
                rate = reader.rate()
                start = time.perf_counter()
                call(case)
                case.samples.append((number, time.perf_counter() - start, rate))


def call(case: Case) -> torch.Tensor:
    if case.isa is not None:
        use(case.isa)
    return case.call(case.next_copies())


def summary(case: Case, cases: Sequence[Case], best_rate: float) -> dict[str, Any]:
    seconds = [sample[1] for sample in case.samples]
    rates = [case.nbytes / second for second in seconds]
    key = (case.kernel, case.tokens, TORCH)
    rival = next((c for c in cases if c is not case and (c.kernel, c.tokens, c.by) == key), None)
    return {
        "kernel": case.kernel,
        "by": case.by,
        "activations": case.activations,
        "tokens": case.tokens,
        "read_bytes": case.nbytes,
        "weights": case.numel,
        "copies": case.copies,
        "rounds": len(seconds),
        "ms": {
            "median": 1000 * statistics.median(seconds),
            "min": 1000 * min(seconds),
            "max": 1000 * max(seconds),
        },
        "gb_per_s": statistics.median(rates) / 1e9,
        "gflop_per_s": 2e-9 * case.tokens * case.numel / statistics.median(seconds),
        "share_of_read": Ratio.of(rates, [sample[2] for sample in case.samples]).to_dict(),
        "best_share_of_read": max(rates) / best_rate,
        "share_of_nf4": share_of_nf4(case, cases),
        "best_share_of_nf4": best_share_of_nf4(case, cases),
        "times_torch": None if rival is None else times(case, rival).to_dict(),
        "best_times_torch": None if rival is None else min(seconds) / min(s for _, s, _ in rival.samples),
        "error": case.error,
    }


def nf4_of(case: Case, cases: Sequence[Case]) -> Case | None:
    """The NF4 expert that a case of another format is compared with."""
    if case.kernel not in EXPERTS or case.kernel == EXPERT:
        return None
    key = (EXPERT, case.by, case.activations, case.tokens)
    return next((c for c in cases if (c.kernel, c.by, c.activations, c.tokens) == key), None)


def share_of_nf4(case: Case, cases: Sequence[Case]) -> dict[str, Any] | None:
    nf4 = nf4_of(case, cases)
    if nf4 is None:
        return None
    ours, theirs = ({number: c.nbytes / s for number, s, _ in c.samples} for c in (case, nf4))
    both = sorted(ours.keys() & theirs.keys())
    return Ratio.of([ours[number] for number in both], [theirs[number] for number in both]).to_dict()


def best_share_of_nf4(case: Case, cases: Sequence[Case]) -> float | None:
    """As `share_of_nf4`, but of the fastest calls."""
    nf4 = nf4_of(case, cases)
    if nf4 is None:
        return None
    ours, theirs = (c.nbytes / min(s for _, s, _ in c.samples) for c in (case, nf4))
    return ours / theirs


def times(ours: Case, theirs: Case) -> Ratio:
    """Seconds of ours over theirs, in the rounds that timed both."""
    mine, other = ({number: s for number, s, _ in case.samples} for case in (ours, theirs))
    both = sorted(mine.keys() & other.keys())
    return Ratio.of([mine[number] for number in both], [other[number] for number in both])


def report(options: argparse.Namespace, cases: Sequence[Case], reader: Reader, load: Sequence[float]) -> None:
    best, usual = max(reader.rates), statistics.median(reader.rates)
    rows = [summary(case, cases, best) for case in cases]
    found = verdicts(rows)
    print(
        f"memory read at {best / 1e9:.1f} GB/s at best, {usual / 1e9:.1f} mostly, {options.threads} threads; "
        f"load {load[0]:.1f} before, {load[1]:.1f} after"
    )
    print_table(rows)
    print_verdicts(found)
    result = {
        "benchmark": "kernels",
        "width": options.width,
        "hidden": options.hidden,
        "experts": options.experts,
        "threads": options.threads,
        "rounds": options.rounds,
        "last_cache_bytes": last_cache_bytes(),
        "read": {"best": best, "median": usual, "lowest": min(reader.rates), "reads": len(reader.rates)},
        "cases": rows,
        "targets": found,
        "load": list(load),
        "machine": bandwidth.machine(),
        **versions(),
    }
    finish(result, options.json)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'':25} {'act.':4} {'tok':>3} {'n':>3} {'ms':>8} {'min':>8} {'max':>8} {'GB/s':>6} "
        f"{'of read (95 %)':>21} {'best':>5} {'x torch (95 %)':>22} {'best':>6} {'GFLOP/s':>7} {'error':>7}"
    )
    for row in rows:
        ms, peer = row["ms"], row["times_torch"]
        against = f"{brief(peer):>22} {row['best_times_torch']:6.2f}" if peer else " " * 29
        print(
            f"{row['kernel']:11} {row['by']:13} {row['activations']:4} {row['tokens']:3} {row['rounds']:3} "
            f"{ms['median']:8.2f} {ms['min']:8.2f} {ms['max']:8.2f} {row['gb_per_s']:6.2f} "
            f"{brief(row['share_of_read']):>21} {row['best_share_of_read']:5.2f} {against} "
            f"{row['gflop_per_s']:7.1f} {row['error']:7.1e}"
        )


def print_verdicts(found: Sequence[dict[str, Any]]) -> None:
    for verdict in found:
        of = {
            "share_of_read": "of the read bandwidth",
            "share_of_nf4": "of NF4's bandwidth",
            "times_torch": "of torch's time",
        }[verdict["figure"]]
        bound = f"at {'least' if verdict['at_least'] else 'most'} {verdict['target']}"
        outcome = ("holds" if verdict["holds"] else "missed") + ("" if verdict["certain"] else ", uncertain")
        print(
            f"{verdict['kernel']}, {verdict['isa']}, {verdict['activations']}, {verdict['tokens']} tok: "
            f"{brief(verdict['paired'])} {of}, best {verdict['best']:.2f}; target {bound}: {outcome}"
        )


def brief(ratio: dict[str, Any]) -> str:
    ends = "few rounds" if ratio["low"] is None else f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"{ratio['median']:.2f} ({ends})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=32)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--isas", nargs="+", choices=ISAS, help="default: all that this processor has")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 16, 128])
    parser.add_argument("--width", type=int, default=4096, help="of the model")
    parser.add_argument("--hidden", type=int, default=14336, help="of an expert")
    parser.add_argument("--experts", type=int, default=2, help="that one token goes to")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads", "experts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} measures nothing; use 1 at least")
    if min(options.tokens) < 1:
        parser.error(f"--tokens {min(options.tokens)} is no batch; use 1 at least")
    for name in ("width", "hidden"):
        if getattr(options, name) < 64 or getattr(options, name) % 64:
            parser.error(f"--{name} {getattr(options, name)} is no multiple of 64, the kernels' block")
    lib = library()
    if lib is None:
        parser.error("the C++ library was not compiled; install a C++17 compiler and moe-local again")
    available = list(ISAS[: lib.moe_best_isa() + 1])
    absent = [isa for isa in options.isas or [] if isa not in available]
    if absent:
        parser.error(f"--isas {absent[0]}: this processor has {', '.join(available)}")
    options.isas = options.isas or available
    return options


if __name__ == "__main__":
    sys.exit(main())
