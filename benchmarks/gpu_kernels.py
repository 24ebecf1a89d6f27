"""How near do the grouped GPU kernels come to the memory's speed, and what does a step cost around them?

Method. Random NF4 experts of a model's true widths fill an arena larger than the last-level cache; steps use
them in turn, so that none is still cached when it is used again. Only the kernels are timed, many launches in
one CUDA graph between two events; in each round all of them, and reading a buffer, take their turns.
  up, down   one launch for all experts of a step: bytes of weights and scales / time
  up, loads  up with levels loaded from memory instead of shuffled between lanes (triton_formats.level)
  combine    the weighted sum: only microseconds, since its bytes are few
  step       all that a layer does, from begin to result, launched from Python: wall time per step of many
             steps with one wait at the end, so that it is the host's time where the host is slower
  one by one the same, expert after expert: by bitsandbytes' kernels in NF4, decoded by torch in other formats
  of read    GB/s over those of summing a buffer in the same round: the median, and the interval that holds
             the true median with 95 % confidence (ratio.py)
  floor      milliseconds of reading a layer's bytes at the best rate of reading
Before timing, a step's result is checked against that of one by one.

Run: python benchmarks/gpu_kernels.py [--models mixtral-8x7b] [--formats nf4 fp8] [--tokens 1 4] [--rounds 12]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from kernel_cases import Lent, Swiglu
from ratio import Ratio
from report import cuda_device, finish, in_rounds, parser_of, versions

from moe_local.offload.kernels.contracts import LayerStep
from moe_local.offload.kernels.expert import ExpertKernels
from moe_local.offload.kernels.grouped import GroupedExperts, GroupedStep
from moe_local.offload.kernels.launcher import UNIT, Launcher
from moe_local.offload.kernels.layer import OneByOne
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.plan import bandwidth
from moe_local.offload.quantize.codec import codec_for, codecs
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.stored import StoredFormat
from moe_local.offload.quantize.views import segment_view

ARENA_BYTES = 1 << 30
"""Bytes of experts in the arena, or fewer if a layer has fewer: far more than any last-level cache holds."""
LAUNCHES = 24
"""Launches of a kernel in one graph, and steps in one run."""
WAIT_CYCLES = 200_000
"""Some 0.1 ms: longer than the host takes to launch a graph."""
SCALES = {"int8": 3e-4, "fp8": 0.05}
"""Scales of formats for which the default scale of 0.02 would not give weights of about that size."""
ERROR_LIMIT = 2e-2
"""Largest relative difference from one by one in bf16, which rounds the weights to bf16."""

NVFP4 = StoredFormat("nvfp4", "bfloat16")
"""The only format here that has no codec, since checkpoints alone have it."""

FORMATS = [*(name for name, codec in codecs().items() if not codec.exact), NVFP4.name]


class Shape(NamedTuple):
    """The sizes of an MoE layer."""

    hidden: int
    width: int
    experts: int
    top_k: int


SHAPES = {"mixtral-8x7b": Shape(4096, 14336, 8, 2), "qwen3-30b-a3b": Shape(2048, 768, 128, 8)}


class Bench:
    """Steps of one shape and number of tokens, and the kernels of these steps alone."""

    def __init__(self, name: str, tokens: int, device: torch.device, format: str = "nf4") -> None:
        self.name, self.tokens, self.shape, self.format = name, tokens, SHAPES[name], format
        self._math = Swiglu()
        shape = self.shape
        specs = [
            TensorSpec("gate_up_proj", (2 * shape.width, shape.hidden)),
            TensorSpec("down_proj", (shape.hidden, shape.width)),
        ]
        self.layout = layout_of(format, specs)
        count = min(shape.experts, max(2 * shape.top_k, ARENA_BYTES // self.layout.nbytes))
        self._leases = random_experts(self.layout, count, device)
        experts = GroupedExperts()
        launcher = experts.launcher(self._math, device, self.layout)
        experts.stop_shuffling(device, self.layout)
        loading = experts.launcher(self._math, device, self.layout)
        if launcher is None or loading is None:
            sys.exit("the grouped kernels do not run here: they need Triton and the C++ library")
        self._launcher: Launcher = launcher
        self._loading: Launcher = loading
        self._each = ExpertKernels()
        generator = torch.Generator().manual_seed(tokens)
        self._x = torch.randn(tokens, shape.hidden, generator=generator).to(device, torch.bfloat16)
        self._weights = torch.rand(tokens, shape.top_k, generator=generator).to(device, torch.bfloat16)
        self._steps = [self._routing(number, count) for number in range(LAUNCHES)]

    def _routing(self, number: int, count: int) -> Routing:
        """A step whose tokens all choose the same experts: the fewest bytes per token."""
        first = number * self.shape.top_k
        ids = [(first + rank) % count for rank in range(self.shape.top_k)]
        return Routing(ids * self.tokens, self.tokens, count)

    def nbytes(self, matrix: str) -> int:
        """Bytes of one matrix in all experts of a step."""
        return self.shape.top_k * sum(segment.nbytes for segment in self.layout.parts(matrix))

    def check(self) -> float:
        """The largest relative difference from one by one."""
        errors = []
        for routing in self._steps[:3]:
            got, want = (self._run(begin(routing), routing) for begin in (self._grouped, self._one_by_one))
            errors.append(float((got.float() - want.float()).norm() / want.float().norm()))
        return max(errors)

    def kernels(self) -> dict[str, Callable[[], object]]:
        """By kernel, the replay of a graph with LAUNCHES launches of it."""
        launcher, top_k = self._launcher, self.shape.top_k
        steps = [self._grouped(routing) for routing in self._steps]
        planes = launcher.planes(self._x)
        hidden = torch.zeros(self.tokens * top_k, launcher.hidden, device=self._x.device)
        outputs = torch.zeros(self.tokens * top_k, launcher.width, device=self._x.device)
        combined = torch.empty_like(self._x)
        launches = []
        for step, routing in zip(steps, self._steps, strict=True):
            group = [self._leases[expert] for expert in routing.experts]
            launches.append((group[0].buffer, step.table(group)))

        def up(launcher: Launcher) -> None:
            for base, table in launches:
                launcher.up(base, UNIT, table, planes, hidden, top_k)

        def down() -> None:
            for base, table in launches:
                launcher.down(base, UNIT, table, hidden, outputs)

        def combine() -> None:
            for _ in launches:
                launcher.combine(outputs, self._weights, combined)

        works = {"up": partial(up, launcher), "up, loads": partial(up, self._loading)}
        works |= {"down": down, "combine": combine}
        return {name: graph_of(work) for name, work in works.items()}

    def whole(self) -> dict[str, Callable[[], object]]:
        """By kind of step, a run of LAUNCHES steps from Python."""

        def steps(begin: Callable[[Routing], LayerStep]) -> Callable[[], object]:
            return lambda: [self._run(begin(routing), routing) for routing in self._steps]

        return {"step": steps(self._grouped), "one by one": steps(self._one_by_one)}

    def _run(self, step: LayerStep, routing: Routing) -> torch.Tensor:
        step.compute([self._leases[expert] for expert in routing.experts])
        return step.result()

    def _grouped(self, routing: Routing) -> GroupedStep:
        return GroupedStep(
            self._launcher, self._x, routing, self._weights, lambda outputs: self._one_by_one(routing)
        )

    def _one_by_one(self, routing: Routing) -> LayerStep:
        return OneByOne(self._each, self._math, self._x, routing, self._weights)


def layout_of(format: str, specs: Sequence[TensorSpec]) -> Layout:
    """The layout of an expert in one of FORMATS."""
    return (NVFP4 if format == NVFP4.name else codec_for(format)).layout(specs)


def random_experts(layout: Layout, count: int, device: torch.device) -> list[Lent]:
    """Experts in one arena: random codes, with scales that make the weights about as large as a model's."""
    arena = torch.randint(0, 256, (count, layout.nbytes), dtype=torch.uint8, device=device)
    for buffer in arena:
        for segment in layout.segments:
            view = segment_view(buffer, segment)
            if segment.dtype in ("float32", "float16"):
                view.fill_(SCALES.get(layout.format, 0.02))
            elif segment.dtype == "float8_e4m3fn":
                view.view(torch.uint8).bitwise_and_(0xBF)  # clears a bit that all codes of NaN have
            elif layout.format == "mxfp4" and segment.part == "scale":
                view.fill_(120)
    return [Lent(expert, buffer, layout) for expert, buffer in enumerate(arena)]


def graph_of(work: Callable[[], object]) -> Callable[[], object]:
    """A function that replays `work`, captured in a graph, and keeps the tensors alive that `work` holds: the
    graph reads them at their addresses."""
    work()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> object:
        graph.replay()
        return work

    return replay


def device_seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT_CYCLES)  # until the launch is on its way, which is not the kernels' time
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def wall_seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """Measure one case: a model, a format and a number of tokens."""
    error = bench.check()
    if not error < ERROR_LIMIT:
        case = f"{bench.name}, {bench.tokens} tokens"
        sys.exit(f"{case}: error {error:.2g}, above {ERROR_LIMIT}; run the gpu tests")
    buffer = torch.ones(1 << 27, dtype=torch.int64, device="cuda")
    read = graph_of(buffer.sum)
    works = {"read": partial(device_seconds, read)}
    works |= {name: partial(device_seconds, work) for name, work in bench.kernels().items()}
    works |= {name: partial(wall_seconds, work) for name, work in bench.whole().items()}
    found = in_rounds(works, rounds)
    rates = [buffer.nbytes / s for s in found.pop("read")]
    seconds = {name: [s / LAUNCHES for s in each] for name, each in found.items()}
    nbytes = {"up": bench.nbytes("gate_up_proj"), "down": bench.nbytes("down_proj"), "combine": 0}
    nbytes["up, loads"] = nbytes["up"]
    total = nbytes["up"] + nbytes["down"]
    rows = {name: row(times, nbytes.get(name, total), rates) for name, times in seconds.items()}
    return {
        "model": bench.name,
        "format": bench.format,
        "tokens": bench.tokens,
        "bytes": total,
        "read_gb_per_s": max(rates) / 1e9,
        "floor_ms": 1000 * total / max(rates),
        "error": error,
        "kernels": rows,
    }


def row(times: Sequence[float], nbytes: int, reads: Sequence[float]) -> dict[str, Any]:
    """Figures of one kernel or step that reads `nbytes`; `reads`: rates of reading in the same rounds."""
    found: dict[str, Any] = {
        "us": {"median": 1e6 * statistics.median(times), "low": 1e6 * min(times), "high": 1e6 * max(times)}
    }
    if nbytes:
        rates = [nbytes / value for value in times]
        found |= {
            "gb_per_s": statistics.median(rates) / 1e9,
            "share_of_read": Ratio.of(rates, reads).to_dict(),
        }
    return found


def print_case(case: dict[str, Any]) -> None:
    floor, read = case["floor_ms"], case["read_gb_per_s"]
    what = f"{case['model']}, {case['format']}, {case['tokens']} tokens"
    print(f"{what}: floor {floor:.3f} ms a layer at {read:.0f} GB/s read")
    for name, found in case["kernels"].items():
        us = found["us"]
        line = f"  {name:11}{us['median']:9.1f} us ({us['low']:.1f} to {us['high']:.1f})"
        if "gb_per_s" in found:
            share = found["share_of_read"]
            line += f"  {found['gb_per_s']:7.0f} GB/s  {share['median']:.2f} of read"
            if share["low"] is not None:
                line += f" ({share['low']:.2f} to {share['high']:.2f})"
        print(line)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = cuda_device("gpu_kernels.py")
    cases = []
    with torch.inference_mode():
        for name, format, tokens in product(options.models, options.formats, options.tokens):
            cases.append(measure(Bench(name, tokens, device, format), options.rounds))
            print_case(cases[-1])
            torch.cuda.empty_cache()
    import triton

    result = {
        "benchmark": "gpu_kernels",
        "gpu": torch.cuda.get_device_name(device),
        "rounds": options.rounds,
        "launches": LAUNCHES,
        "cases": cases,
        "machine": bandwidth.machine(),
        "triton": triton.__version__,
        **versions(),
    }
    finish(result, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=12)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, choices=range(1, 9), default=[1, 4], metavar="1..8")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["nf4"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
