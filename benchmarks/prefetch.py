"""What does prefetch gain where the link has idle time, and what does it cost where it has none?

Method. The same model is loaded once for each way of prefetching (off, router, auto), on the CPU, with fewer
slots than experts, so that misses are read from the expert file: the link. Its speed is either set (--link
2GB: all reads, from the page cache, share that many bytes per second), or that of the page cache (--link
cache), or that of the disk (--link disk: reads go past the page cache, or drop the pages after each read;
slow_reads.py). A round gives every model the same prompt, one after the other; the model that begins, and the
seed, change. Tokens are sampled, so that text and routing vary; ids must agree.
  --weak-layers F  multiplies the embeddings by F: layers then change the residual less, and routers of later
                   layers agree better with what they see early. Random weights have no other good predictor;
                   the resulting accuracy is printed.
  stall            a token's waits for experts, as the store counts them
  idle             a token's time minus the time in which some read was in flight, both without prefetch
  hidden           (ms of off - ms of the other) / min(stall, idle), by rounds: the median, and the interval
                   that holds the true median with 95 % confidence (ratio.py)
  from the start   tokens' time since load over that of off, with the rounds in which auto still tries out
                   settings; `hidden` leaves out the first --settle rounds
  accuracy         experts that were prefetched and needed next / experts prefetched
  covered          experts that were prefetched and needed next / (those + misses that were not prefetched)

Run: python benchmarks/prefetch.py MODEL [--link 2GB|disk] [--slots 4] [--tokens 48] [--rounds 9]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratio import Ratio, median_interval
from report import finish, parser_of
from slow_reads import SlowReads, slow_reads

import moe_local
from moe_local.cache.keys import parse_bytes
from moe_local.offload.plan import bandwidth
from moe_local.offload.tiers.transfer import FileSource


@dataclass(frozen=True, slots=True)
class Round:
    """One answer: milliseconds per token after the first, and their parts."""

    ms: float
    stall_ms: float
    busy_ms: float
    misses: float
    ids: tuple[int, ...]
    first: bool
    """Whether it is one of the first --settle rounds."""

    @property
    def hideable_ms(self) -> float:
        return min(self.stall_ms, max(0.0, self.ms - self.busy_ms))


class Way:
    """A model with one way of prefetching, and its answers."""

    def __init__(self, name: str, model: moe_local.Model) -> None:
        self.name, self.model = name, model
        self.rounds: list[Round] = []

    def answer(self, prompt: list[int], tokens: int, seed: int, link: SlowReads, first: bool) -> None:
        stream = self.model.stream(
            prompt,
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            seed=seed,
            eos_token_id=None,
        )
        next(stream)
        busy = link.busy_s
        rest = list(stream)
        count = len(rest)
        self.rounds.append(
            Round(
                ms=sum(token.ms for token in rest) / count,
                stall_ms=sum(token.stall_ms for token in rest) / count,
                busy_ms=1000 * (link.busy_s - busy) / count,
                misses=sum(token.misses for token in rest) / count,
                ids=tuple(token.id for token in rest),
                first=first,
            )
        )

    def settled(self) -> list[Round]:
        return [r for r in self.rounds if not r.first]

    def summary(self, off: Way) -> dict[str, Any]:
        mine, theirs = self.settled(), off.settled()
        hidden = [(b.ms - a.ms) / b.hideable_ms for a, b in zip(mine, theirs, strict=True) if b.hideable_ms]
        low, high = median_interval(hidden) or (None, None)
        stats = self.model.stats().prefetch
        right = stats.used + stats.late
        misses = self.model.stats().misses
        return {
            "prefetch": self.name,
            "ms_per_token": statistics.median(r.ms for r in mine),
            "stall_ms": statistics.median(r.stall_ms for r in mine),
            "link_busy_ms": statistics.median(r.busy_ms for r in mine),
            "hideable_ms": statistics.median(r.hideable_ms for r in mine),
            "misses_per_token": statistics.fmean(r.misses for r in mine),
            "hidden": {"median": statistics.median(hidden) if hidden else None, "low": low, "high": high},
            "over_off": Ratio.of([r.ms for r in mine], [r.ms for r in theirs]).to_dict(),
            "from_the_start": sum(r.ms for r in self.rounds) / sum(r.ms for r in off.rounds),
            "accuracy": right / stats.issued if stats.issued else None,
            "covered": right / (stats.used + misses) if stats.issued else None,
            "stats": self.model.stats().to_dict()["prefetch"],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    named = {"disk": None, "cache": math.inf}
    rate = named[options.link] if options.link in named else float(parse_bytes(options.link, "--link"))
    with slow_reads(rate) as link, contextlib.ExitStack() as stack:
        ways = [Way(name, stack.enter_context(loaded(options, name))) for name in ("off", "router", "auto")]
        for number in range(options.settle + options.rounds):
            prompt = [3 + (7 * number + 13 * i) % 250 for i in range(options.prompt_tokens)]
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                way.answer(prompt, options.tokens, number, link, number < options.settle)
            if len({way.rounds[-1].ids for way in ways}) > 1:
                raise SystemExit("ids differ between ways of prefetching")
            print(f"round {number + 1} of {options.settle + options.rounds}", file=sys.stderr)
        report(options, ways, link)


def loaded(options: argparse.Namespace, prefetch: str) -> moe_local.Model:
    model = moe_local.load(
        options.model, device="cpu", slots=options.slots, prefetch=prefetch, dense=options.dense, context=512
    )
    source = model._parts.store.tier.source  # type: ignore[union-attr]
    assert isinstance(source, FileSource)
    source.direct = source.direct or options.link == "disk"
    if options.weak_layers != 1:
        model.hf.get_input_embeddings().weight.data.mul_(options.weak_layers)
    return model


def report(options: argparse.Namespace, ways: Sequence[Way], link: SlowReads) -> None:
    rows = [way.summary(ways[0]) for way in ways]
    rate = link.bytes / link.busy_s
    print(f"link at {rate / 1e9:.2f} GB/s while busy")
    print(
        f"{'':8} {'ms/token':>8} {'stall':>7} {'busy':>7} {'misses':>6}"
        f" {'accurate':>8} {'covered':>7}  hidden"
    )
    for row in rows:
        h = row["hidden"]
        span = "" if h["low"] is None else f" ({h['low']:.2f} to {h['high']:.2f})"
        shares = "".join(f"{row[k]:>{w}.0%}" if row[k] is not None else " " * w for k, w in SHARES)
        print(
            f"{row['prefetch']:8} {row['ms_per_token']:8.2f} {row['stall_ms']:7.2f} "
            f"{row['link_busy_ms']:7.2f} {row['misses_per_token']:6.2f}{shares}  {h['median'] or 0:.2f}{span}"
        )
        over = Ratio(**row["over_off"])
        print(f"{'':8} time / off: {over}, from the start {row['from_the_start']:.3f}; {worth(row['stats'])}")
    result = {
        "benchmark": "prefetch",
        "model": Path(options.model).name,
        "link": options.link,
        "link_bytes_per_s": rate,
        "slots": options.slots,
        "weak_layers": options.weak_layers,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "settle": options.settle,
        "expert_bytes": ways[0].model.plan.to_dict()["bytes"]["expert"],
        "ways": rows,
        "machine": bandwidth.machine(),
        "moe_local": moe_local.__version__,
    }
    finish(result, options.json)


SHARES = (("accuracy", 9), ("covered", 8))


def worth(stats: dict[str, Any]) -> str:
    gain = stats["gain_ms_per_token"]
    return f"{stats['state']}, {stats['lookahead']} ahead" + (
        "" if gain is None else f", {gain:+.2f} ms/token"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=9)
    parser.add_argument("model", help="an alias, a Hub id or a folder")
    parser.add_argument("--link", default="2GB", help="bytes a second, cache or disk; default 2GB")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--weak-layers", type=float, default=1.0)
    parser.add_argument("--dense", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--settle", type=int, default=4)
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.rounds < 1 or options.settle < 0:
        parser.error("use --tokens 2 and --rounds 1 at least, and --settle 0 or more")
    return options


if __name__ == "__main__":
    main()
