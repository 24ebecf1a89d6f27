"""How long is a prompt's way to its first token where most experts are absent, and how long must it be?

Method. Three models with the same weights in one process: one with all experts resident; one with --slots of
them, whose prompts stream through the staging ring; and one with the same slots without a ring, whose prompts
go through the layers' own slots in waves. A round gives each the same prompt, in an order that changes from
round to round, and times the call to the first new token. The first round warms up and does not count. First
ids must agree.
  compute   the all-resident model's time in the same round
  link      the bytes that a model moved, as it counts them, over the bandwidth measured right before and
            after it: from disk, of the expert file itself, past the page cache, four reads of 4 MiB in
            flight; to a GPU, from pinned memory
  floor     max(compute, link): the time with perfect overlap; sum is compute + link, without any overlap
  ratio     a model's time over its floor, and the old way (waves) over the ring: the median of the rounds,
            and the interval that holds the true median with 95 % confidence (ratio.py)
Experts are read past the page cache (--cached: through it), so that a small model on a large machine is read
from disk as a large one would be. On a GPU, RAM holds all experts unless --ram is less; --vram bounds the
card.

Run: python benchmarks/prefill.py --synthetic mixtral-8x7b --layers 4 --device cpu --prompt-tokens 128
     python benchmarks/prefill.py MODEL --vram 24GiB --slots 2 4 --prompt-tokens 512 2048
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moe_local  # before torch, so that torch's idle threads do not spin

# isort: split

import torch
from contenders import spread
from decode import choose_model, machine, model_flags, prompt_ids, write_synthetic
from made import Made
from ratio import Ratio
from report import finish, parser_of

from moe_local.cache.errors import MoeLocalError
from moe_local.cache.keys import format_bytes
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.hub import resolve
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.load import Loadable, assemble, open_experts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.bandwidth import Bandwidths, h2d_bandwidth
from moe_local.offload.plan.fit import plan_load
from moe_local.offload.system.direct_io import Range, page_memory, read_ranges
from moe_local.offload.tiers.slow_link import cuda_device
from moe_local.offload.tiers.transfer import FileSource

FLOOR_EXPERTS = 3
"""Number of experts that are read to measure the disk's current speed."""

Link = Callable[[], dict[str, float]]
"""Measures the current bandwidth of each link, in bytes/s."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt's answer of one token."""

    seconds: float
    stall_s: float
    moved: dict[str, int]
    """Bytes moved over each link."""
    rates: dict[str, float]
    """Bytes/s of each link at that time."""
    id: int

    @property
    def link_s(self) -> float:
        """Seconds that the slowest link needs for its bytes if it is always busy."""
        return max((self.moved[name] / rate for name, rate in self.rates.items()), default=0.0)


@dataclass(slots=True)
class Way:
    """One of the models, and its answers of the counted rounds by prompt length."""

    name: str
    model: moe_local.Model
    answers: dict[int, list[Answer]] = field(default_factory=dict)

    def answer(self, prompt: list[int], link: Link, *, keep: bool) -> None:
        before = link()
        with self.model.stream(prompt, max_new_tokens=1, do_sample=False, eos_token_id=None) as stream:
            (token,) = stream
        stats = stream.stats
        after = link()
        if keep:
            moved = {"disk": stats.counts.bytes.disk, "h2d": stats.counts.bytes.h2d}
            rates = {name: (before[name] + after[name]) / 2 for name in before}
            answer = Answer(stats.ttft_s, stats.stall_s, moved, rates, token.id)
            self.answers.setdefault(len(prompt), []).append(answer)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        run(parse(arguments))
    except MoeLocalError as error:
        raise SystemExit(f"error: {error}") from error


def run(options: argparse.Namespace) -> None:
    checkpoint, file = opened(options)
    with contextlib.ExitStack() as stack:
        ways = [Way("all resident", stack.enter_context(loaded(options, checkpoint, file, None, ring=True)))]
        if ways[0].model.plan.mode != "resident":
            raise SystemExit("the experts do not all fit, and so there is no telling what computing takes")
        for slots in options.slots:
            for ring, name in ((True, "ring"), (False, "old way")):
                model = stack.enter_context(loaded(options, checkpoint, file, slots, ring=ring))
                ways.append(Way(f"{name}, {slots} slots", model))
        measure(options, ways, links(file, ways[0].model.hf.device))
        report(options, ways)


def opened(options: argparse.Namespace) -> tuple[Loadable, ExpertFile]:
    """Open the chosen model, making its weights first if need be. Sets `options.model` to its name."""
    if options.made:
        made = Made(options.made, options.layers)
        options.model = made.checkpoint.name
        return made.checkpoint, made.make()
    if options.synthetic:
        options.model = str(write_synthetic(options.synthetic, options.layers))
    checkpoint = Checkpoint.open(resolve(options.model), options.model)
    return checkpoint, open_experts(checkpoint, options.experts)


def loaded(
    options: argparse.Namespace, checkpoint: Loadable, file: ExpertFile, slots: int | None, *, ring: bool
) -> moe_local.Model:
    """Load with this many slots per layer, for None one per expert; with or without a ring."""
    keywords = {
        "device": options.device,
        "ram": options.ram if slots is not None else None,
        "slots": checkpoint.spec.num_experts if slots is None else slots,
        "experts": options.experts,
        "dense": options.dense,
        "context": options.context,
        "prefetch": options.prefetch,
        "miss": "fetch",
    }
    if options.vram:
        keywords["vram"] = options.vram
    wanted = LoadOptions.from_keywords(keywords)
    target = wanted.torch_device()
    plan = plan_load(checkpoint.name, checkpoint.spec, wanted, [target], Bandwidths()).check()
    if not ring:
        plan = dataclasses.replace(plan, vram_staging=0, ram_staging=0)
    elif options.staging is not None and plan.mode != "resident":
        on_card = {"vram_staging": options.staging} if target.type == "cuda" else {}
        plan = dataclasses.replace(plan, ram_staging=options.staging, **on_card)
    if options.chunk:
        plan = dataclasses.replace(plan, chunk=options.chunk)
    device = cuda_device(target) if target.type == "cuda" else None
    model = assemble(checkpoint, file, plan, wanted, target, device)
    store = model._parts.store  # type: ignore[union-attr]
    source = (store.below or store.tier).source
    assert isinstance(source, FileSource)
    source.direct = source.direct or not options.cached
    return model


def links(file: ExpertFile, device: torch.device) -> Link:
    """A function that measures the links over which experts are loaded."""
    places = [file.location(0, expert) for expert in range(FLOOR_EXPERTS)]
    ranges = [Range(path, offset, page_memory(nbytes)) for path, offset, nbytes in places]
    total = sum(found.out.numel() for found in ranges)

    def rates() -> dict[str, float]:
        start = time.perf_counter()
        read_ranges(ranges)
        found = {"disk": total / (time.perf_counter() - start)}
        if device.type == "cuda":
            found["h2d"] = h2d_bandwidth(device)
        return found

    return rates


def measure(options: argparse.Namespace, ways: Sequence[Way], link: Link) -> None:
    """Let all models answer in turn, and check that their first ids agree."""
    for number in range(options.rounds + 1):
        for tokens in options.prompt_tokens:
            prompt = prompt_ids(ways[0].model, tokens, number)
            first = number % len(ways)
            for way in (*ways[first:], *ways[:first]):
                way.answer(prompt, link, keep=number > 0)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    for tokens in options.prompt_tokens:
        ids = [[answer.id for answer in way.answers[tokens]] for way in ways]
        if ids.count(ids[0]) != len(ids):
            raise SystemExit(f"first ids of {tokens} tokens differ between {[way.name for way in ways]}")


def report(options: argparse.Namespace, ways: Sequence[Way]) -> None:
    rows = [row(way, ways[0], tokens) for tokens in options.prompt_tokens for way in ways]
    gains = [
        {"tokens": tokens, "old": old.name, "ring": ring.name, **over(old, ring, tokens).to_dict()}
        for tokens in options.prompt_tokens
        for ring, old in zip(ways[1::2], ways[2::2], strict=True)
    ]
    print(
        f"{'':28} {'tokens':>6} {'s':>6} {'min':>6} {'max':>6} {'stall':>6} {'GB':>5} "
        f"{'link':>6} {'floor':>6} {'sum':>6}  time / floor"
    )
    for r in rows:
        s = r["seconds"]
        print(
            f"{r['name']:28} {r['tokens']:6} {s['median']:6.2f} {s['min']:6.2f} {s['max']:6.2f} "
            f"{r['stall_s']:6.2f} {r['moved_bytes'] / 1e9:5.2f} {r['link_s']:6.2f} {r['floor_s']:6.2f} "
            f"{r['sum_s']:6.2f}  {Ratio(**r['time_over_floor'])}"
        )
    for gain in gains:
        ratio = Ratio(*(gain[name] for name in ("median", "low", "high", "rounds")))
        print(f"{gain['tokens']} tokens, {gain['old']} / {gain['ring']}: {ratio}")
    plan = ways[1].model.plan.to_dict()
    result = {
        "benchmark": "prefill",
        "model": Path(options.model).name,
        "experts": options.experts,
        "dense": options.dense,
        "expert_bytes": plan["bytes"]["expert"],
        "expert_size": format_bytes(plan["bytes"]["expert"]),
        "moe_layers": plan["moe_layers"],
        "chunk": plan["prefill_chunk"],
        "staging": {"vram": ways[1].model.plan.vram_staging, "ram": ways[1].model.plan.ram_staging},
        "cached": options.cached,
        "rounds": options.rounds,
        "rows": rows,
        "old_over_ring": gains,
        "machine": machine(ways[0].model),
    }
    finish(result, options.json)


def row(way: Way, resident: Way, tokens: int) -> dict[str, Any]:
    """Figures of one model and prompt length: medians over the rounds, and ratios within each round."""
    answers, computed = way.answers[tokens], [answer.seconds for answer in resident.answers[tokens]]
    floors = [max(answer.link_s, compute) for answer, compute in zip(answers, computed, strict=True)]
    sums = [answer.link_s + compute for answer, compute in zip(answers, computed, strict=True)]
    seconds = [answer.seconds for answer in answers]
    rates = {name: spread([answer.rates[name] for answer in answers]) for name in answers[0].rates}
    return {
        "name": way.name,
        "tokens": tokens,
        "seconds": spread(seconds),
        "stall_s": statistics.median(answer.stall_s for answer in answers),
        "moved_bytes": statistics.median(sum(answer.moved.values()) for answer in answers),
        "link_s": statistics.median(answer.link_s for answer in answers),
        "floor_s": statistics.median(floors),
        "sum_s": statistics.median(sums),
        "time_over_floor": Ratio.of(seconds, floors).to_dict(),
        "time_over_sum": Ratio.of(seconds, sums).to_dict(),
        "bytes_per_s": rates,
    }


def over(old: Way, ring: Way, tokens: int) -> Ratio:
    return Ratio.of(*([answer.seconds for answer in way.answers[tokens]] for way in (old, ring)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=7)
    model_flags(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--slots", type=int, nargs="+", default=[2])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--chunk", type=int, help="prompt tokens in one forward; default: as planned")
    parser.add_argument("--staging", type=int, help="slots of the ring, 2 or more; default: as planned")
    parser.add_argument("--prefetch", default="auto", help="off: nothing is read ahead")
    parser.add_argument("--experts", default="nf4")
    parser.add_argument("--dense", default="auto")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--vram")
    parser.add_argument("--ram")
    parser.add_argument("--cached", action="store_true", help="read through the page cache")
    options = parser.parse_args(arguments)
    choose_model(parser, options)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} measures nothing; use 1 at least")
    return options


if __name__ == "__main__":
    main()
