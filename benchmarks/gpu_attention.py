"""How near does a token's attention to a long row of keys come to the GPU memory's speed?

Method. One query in bf16 attends to keys and values with a model's heads. They are in a slab larger than the
last-level cache, whose rows the calls use in turn. Only the calls are timed, many in one CUDA graph between
two events; in each round all contenders, and reading a buffer, take their turns.
  parts  as in replayed tokens: a float mask, and the row is split so that every multiprocessor has a part
  whole  the same mask in one piece: one thread block per key head
  plain  no mask, query heads share key heads: as in the plain forward (torch's flash attention)
The mask shows three quarters of the columns; all of them are read, and counted as bytes.
  of read  GB/s over those of summing a buffer in the same round: the median, and the interval that holds the
           true median with 95 % confidence (ratio.py)
Before timing, the result of parts is checked against that of whole.

Run: python benchmarks/gpu_attention.py [--models mixtral-8x7b] [--columns 1024 4096 16384] [--rounds 12]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from gpu_kernels import LAUNCHES, device_seconds, graph_of, row
from report import cuda_device, finish, in_rounds, parser_of, versions
from torch.nn import functional as F

from moe_local.offload.dense.split_attention import attend_in_parts, parts_of
from moe_local.offload.plan import bandwidth

SLAB_BYTES = 1 << 29
"""Bytes of keys and values: far more than any last-level cache holds."""
ERROR_LIMIT = 1e-2
"""Largest relative difference of parts from whole, both in bf16."""


class Heads(NamedTuple):
    """The heads of a layer's attention: numbers of query heads and key heads, and the width of each."""

    heads: int
    of_keys: int
    width: int


MODELS = {
    "mixtral-8x7b": Heads(32, 8, 128),
    "qwen3-30b-a3b": Heads(32, 4, 128),
    "gpt-oss-120b": Heads(64, 8, 64),
}


class Bench:
    """A query of one model, and rows of keys and values of one length."""

    def __init__(self, name: str, columns: int, device: torch.device) -> None:
        heads = MODELS[name]
        self.name, self.columns = name, columns
        self.nbytes = 2 * 2 * heads.of_keys * columns * heads.width
        count = max(2, min(LAUNCHES, SLAB_BYTES // self.nbytes))
        shape = (2, count, heads.of_keys, columns, heads.width)
        keys, values = torch.randn(shape, dtype=torch.bfloat16, device=device)
        self._rows = [
            (keys[row : row + 1], values[row : row + 1]) for row in (n % count for n in range(LAUNCHES))
        ]
        self._query = torch.randn(1, heads.heads, 1, heads.width, dtype=torch.bfloat16, device=device)
        self._packed = self._query.view(1, heads.of_keys, -1, heads.width)
        self._mask = torch.zeros(1, 1, 1, columns, dtype=torch.bfloat16, device=device)
        self._mask[..., columns * 3 // 4 :] = torch.finfo(torch.bfloat16).min
        self.parts = parts_of(self._packed, *self._rows[0])

    def contenders(self) -> dict[str, Callable[[], object]]:
        """Contenders by name; each run attends to every row once."""
        attends: dict[str, Callable[..., torch.Tensor]] = {
            "parts": self._in_parts,
            "whole": self._whole,
            "plain": self._plain,
        }

        def through(attend: Callable[..., torch.Tensor]) -> Callable[[], object]:
            return lambda: [attend(*row) for row in self._rows]

        return {name: through(attend) for name, attend in attends.items()}

    def check(self) -> float:
        """The relative difference of parts from whole."""
        got, want = (attend(*self._rows[0]).float() for attend in (self._in_parts, self._whole))
        return float((got - want).norm() / want.norm())

    def _in_parts(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_in_parts(self._packed, key, value, self._mask, None, self.parts)

    def _whole(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self._packed, key, value, attn_mask=self._mask)

    def _plain(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self._query, key, value, enable_gqa=True)


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """Measure one case: a model and a number of columns."""
    error = bench.check()
    if not error < ERROR_LIMIT:
        sys.exit(f"{bench.name}, {bench.columns} columns: error {error:.2g}, above {ERROR_LIMIT}")
    buffer = torch.ones(1 << 27, dtype=torch.int64, device="cuda")
    read = graph_of(buffer.sum)
    works = {"read": read, **{name: graph_of(work) for name, work in bench.contenders().items()}}
    found = in_rounds({name: partial(device_seconds, work) for name, work in works.items()}, rounds)
    rates = [buffer.nbytes / s for s in found.pop("read")]
    seconds = {name: [s / LAUNCHES for s in each] for name, each in found.items()}
    return {
        "model": bench.name,
        "columns": bench.columns,
        "parts": bench.parts,
        "bytes": bench.nbytes,
        "read_gb_per_s": max(rates) / 1e9,
        "error": error,
        "calls": {name: row(times, bench.nbytes, rates) for name, times in seconds.items()},
    }


def print_case(case: dict[str, Any]) -> None:
    print(f"{case['model']}, {case['columns']} columns in {case['parts']} parts")
    for name, found in case["calls"].items():
        us, share = found["us"], found["share_of_read"]["median"]
        spread = f"({us['low']:.1f} to {us['high']:.1f})"
        print(f"  {name:6}{us['median']:9.1f} us {spread}  {share:.2f} of read")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = cuda_device("gpu_attention.py")
    cases = []
    with torch.inference_mode():
        for name, columns in product(options.models, options.columns):
            cases.append(measure(Bench(name, columns, device), options.rounds))
            print_case(cases[-1])
            torch.cuda.empty_cache()
    result = {
        "benchmark": "gpu_attention",
        "gpu": torch.cuda.get_device_name(device),
        "rounds": options.rounds,
        "calls": LAUNCHES,
        "cases": cases,
        "machine": bandwidth.machine(),
        **versions(),
    }
    finish(result, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=12)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--columns", nargs="+", type=int, default=[1024, 4096, 16384], metavar="N")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
