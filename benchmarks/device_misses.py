"""How fast does a GPU bring experts from RAM by its own loads, beside its copy engine?

Method. Experts of Qwen3-30B-A3B's size are in pinned RAM; 1, 2, 4 or 8 at a time are copied to slots by
  kernel   the kernel of triton_fetch, launched from a CUDA graph, as in a token
  engine   cudaMemcpyAsync, once per expert, on a stream of its own
Each is timed by events over many steps, each of which copies other experts; the two take turns. Figures are
GB/s, medians over rounds. `ratio` is kernel / engine of the same round (ratio.py). `look-up` is the preceding
kernel alone, and `empty` the copy kernel with nothing to copy, in microseconds: a layer's cost when all its
experts are hits. Before timing, the copied bytes are compared with the source.

Run: python benchmarks/device_misses.py [--rounds 12] [--json FILE]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_kernels import graph_of
from ratio import Ratio
from report import cuda_device, finish, in_rounds, parser_of

from moe_local.offload.kernels.fetch import LOG_HEAD, LayerTables, fetch_kernels
from moe_local.offload.kernels.launcher import UNIT
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.mapped import is_mapped

NBYTES, EXPERTS, SLOTS, TOP_K, STEPS = 2437120, 128, 64, 8, 16


class Bench:
    """Experts in RAM, slots on the device, and the tables that the kernels read."""

    def __init__(self, device: torch.device) -> None:
        self.host = HostArena([EXPERTS], [-(-NBYTES // 4096) * 4096], pin=True)
        if not is_mapped(self.host.memory):
            sys.exit("the GPU does not see pinned RAM at the host's addresses")
        self.ram = self.host.memory.tensor
        generator = torch.Generator().manual_seed(0)
        self.ram.copy_(torch.randint(256, self.ram.shape, dtype=torch.uint8, generator=generator))
        self.arena = torch.zeros(SLOTS, NBYTES, dtype=torch.uint8, device=device)
        found = fetch_kernels(device)
        if found is None:
            sys.exit("Triton does not run here")
        self.fetch = found
        self.stream = torch.cuda.Stream(device)
        self._sources = torch.tensor([self.host.offset(0, e) for e in range(EXPERTS)], device=device)
        self._offsets = torch.arange(SLOTS, device=device) * (NBYTES // UNIT)

    def tables(self, step: int, missing: int) -> LayerTables:
        """Tables as `look_up` leaves them in this step if `missing` of its experts were absent."""
        ids = [(step * TOP_K + rank) % EXPERTS for rank in range(TOP_K)]
        slots = [(step * TOP_K + rank) % SLOTS if rank < missing else -1 for rank in range(TOP_K)]
        device = self.arena.device
        log = torch.tensor([1, 0, 0, 0, *ids, *slots], device=device)
        resident = torch.arange(EXPERTS, device=device) % SLOTS
        order = torch.tensor([0, *range(3 * TOP_K)], device=device)
        zeros = torch.zeros(SLOTS, dtype=torch.int64, device=device)
        clock = torch.zeros(1, dtype=torch.int64, device=device)
        return LayerTables(resident, zeros, zeros, self._offsets, self._sources, order, clock, log)

    def kernel(self, missing: int) -> Callable[[], object]:
        steps = [self.tables(step, missing) for step in range(STEPS)]
        return graph_of(lambda: [self.fetch.bring(each, self.ram, self.arena[0], NBYTES) for each in steps])

    def look_up(self) -> Callable[[], object]:
        tables, ids = self.tables(0, 0), torch.arange(TOP_K, device=self.arena.device)
        return graph_of(lambda: [self.fetch.look_up(tables, ids, begins=True) for _ in range(STEPS)])

    def engine(self, missing: int) -> Callable[[], object]:
        pairs = [
            (self.arena[(step * TOP_K + rank) % SLOTS], self.host.buffer(0, (step * TOP_K + rank) % EXPERTS))
            for step in range(STEPS)
            for rank in range(missing)
        ]

        def copy() -> None:
            for target, source in pairs:
                target.copy_(source[:NBYTES], non_blocking=True)

        return copy

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one step of a run."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            begin.record(self.stream)
            run()
            end.record(self.stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / STEPS

    def check(self) -> None:
        """Raise unless the kernel copies the experts' exact bytes."""
        self.arena.zero_()
        tables = self.tables(1, TOP_K)
        self.fetch.bring(tables, self.ram, self.arena[0], NBYTES)
        ids, slots = tables.log[LOG_HEAD : LOG_HEAD + TOP_K].tolist(), tables.log[LOG_HEAD + TOP_K :].tolist()
        for expert, slot in zip(ids, slots, strict=True):
            if not torch.equal(self.arena[slot].cpu(), self.host.buffer(0, expert)[:NBYTES]):
                raise RuntimeError(f"expert {expert} came wrong")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, rounds=12)
    options = parser.parse_args(arguments)
    bench = Bench(cuda_device("device_misses.py"))
    bench.check()
    result: dict[str, Any] = {"benchmark": "device_misses", "device": torch.cuda.get_device_name(), "by": {}}
    for missing in (1, 2, 4, 8):
        ways = {"kernel": bench.kernel(missing), "engine": bench.engine(missing)}
        seconds = in_rounds({name: partial(bench.seconds, run) for name, run in ways.items()}, options.rounds)
        rates = {name: [missing * NBYTES / s / 1e9 for s in each] for name, each in seconds.items()}
        entry: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
        entry["ratio"] = Ratio.of(rates["kernel"], rates["engine"]).to_dict()
        result["by"][missing] = entry
        print(f"{missing} missing: kernel {entry['kernel']:.1f} GB/s, engine {entry['engine']:.1f} GB/s")
    for name, run in (("look_up_us", bench.look_up()), ("empty_us", bench.kernel(0))):
        result[name] = 1e6 * statistics.median(bench.seconds(run) for _ in range(options.rounds))
        print(f"{name} {result[name]:.2f}")
    bench.host.close()
    finish(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
