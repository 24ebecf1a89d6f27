"""What would each eviction policy have hit on recorded routes, and how much is there to gain?

Method. The decode steps of a recording drive the product's own cache and policies (moe_local.cache.replay),
from an empty cache, with loads that end at once: a layer's experts are looked up together, then touched, then
the absent ones are admitted, never by evicting another expert of the same step.
  cold      hits per expert needed, all decode steps
  steady    the second half of them
  belady    the optimum of such caches: evict the expert that is needed latest. All needed experts are
            admitted.
  gap       share of the way from LRU to that optimum
With --below N, the same over a second tier of N slots per layer (VRAM over RAM over a disk): the experts
copied from it, and those read into it, in the second half of the steps, in hundredths of the experts needed;
`every copy kept` is a lower tier that ignores what the upper one holds (cache/beside.py).
For a cache that may use an expert without keeping it, the optimum is higher; a note says how much.
A hit rate is not a time: a policy saves the cost of the misses it avoids, less its own time
(cache_overhead.py); decode.py --policy measures the result.

Run: python benchmarks/replay.py --routes FILE --slots N[,N...] [--policy NAME[,NAME...]] [--below N] [--json]
Prints a table; with --json that goes to stderr, and to stdout goes one array of
{"slots_per_layer", "policy", "hit_rate": {"cold", "steady"}}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cache.policies import POLICIES
from moe_local.cache.replay import HitRates, optimum_with_bypass, replay
from moe_local.cache.replay_tiers import replay_tiers
from moe_local.cache.routes import Routes, read_routes

OPTIMUM = "belady"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--routes", required=True, metavar="FILE", help="a recording (route_trace v1)")
    parser.add_argument("--slots", required=True, metavar="N[,N...]", help="experts kept a layer")
    parser.add_argument(
        "--policy", default="all", metavar="NAME[,NAME...]", help=f"of {', '.join([*POLICIES, OPTIMUM])}; all"
    )
    parser.add_argument("--below", type=int, metavar="N", help="experts kept a layer by a tier below")
    parser.add_argument("--json", action="store_true", help="exactly one JSON array on stdout")
    options = parser.parse_args(arguments)
    try:
        slots, policies = slot_counts(options.slots), policy_names(options.policy)
        routes = read_routes(options.routes)
        table = {(count, policy): hit_rates(routes, count, policy) for count in slots for policy in policies}
        bypass = {count: optimum_with_bypass(routes, count) for count in slots}
    except MoeLocalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print_table(routes, table, bypass, sys.stderr if options.json else sys.stdout)
    if options.below is not None:
        over = {key: options.below for key in table if key[1] != OPTIMUM}
        print_tiers(routes, over, sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(list(entries(table))))
    return 0


def slot_counts(text: str) -> list[int]:
    """The numbers in a list such as "16,32", without repetitions. Raises OptionError."""
    counts = {}
    for cell in text.split(","):
        if not (cell.strip().isascii() and cell.strip().isdigit()) or not int(cell):
            raise OptionError(
                f"--slots {text!r}: {cell!r} is not a number from 1 up; write for example 16,32"
            )
        counts[int(cell)] = None
    return list(counts)


def policy_names(text: str) -> list[str]:
    """The names in a list such as "lru,belady", or all names for "all". Raises OptionError."""
    known = [*POLICIES, OPTIMUM]
    if text == "all":
        return known
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise OptionError(f"--policy {name!r} is not known; choose of {', '.join(known)}, or all")
    return list(dict.fromkeys(names))


def hit_rates(routes: Routes, slots: int, policy: str) -> HitRates:
    done = replay(routes, slots, policy)
    cold, steady = done.cold.hit_rate, done.steady.hit_rate
    assert cold is not None
    assert steady is not None
    return HitRates(cold, steady)


def entries(table: dict[tuple[int, str], HitRates]) -> Iterator[dict[str, object]]:
    for (slots, policy), rates in table.items():
        yield {"slots_per_layer": slots, "policy": policy, "hit_rate": rates._asdict()}


def print_table(
    routes: Routes, table: dict[tuple[int, str], HitRates], bypass: dict[int, HitRates], file: TextIO
) -> None:
    print(
        f"{routes.model}: {len(routes.layers)} layers, {routes.num_experts} experts, {routes.top_k} a token",
        file=file,
    )
    print(f"{'slots':>6} {'policy':10} {'cold':>6} {'steady':>7} {'gap closed':>16}", file=file)
    for (slots, policy), rates in table.items():
        lru, best = table.get((slots, "lru")), table.get((slots, OPTIMUM))
        closed = ""
        if lru and best and policy != "lru":
            closed = " / ".join(gap(*values) for values in zip(lru, rates, best, strict=True))
        print(f"{slots:6} {policy:10} {rates.cold:6.3f} {rates.steady:7.3f} {closed:>16}", file=file)
    for slots, best in bypass.items():
        print(
            f"{slots} slots, were experts used without being kept: at most {best.cold:.3f} {best.steady:.3f}",
            file=file,
        )


def print_tiers(routes: Routes, over: dict[tuple[int, str], int], file: TextIO) -> None:
    print(
        f"{'slots':>6} {'below':>6} {'policy':10} {'copied':>7} {'read':>6} {'every copy kept':>16}",
        file=file,
    )
    for (slots, policy), below in over.items():
        minding, plain = (
            replay_tiers(routes, slots, below, policy, beside=beside) for beside in (True, False)
        )
        print(
            f"{slots:6} {below:6} {policy:10} {100 * minding.copies:7.1f} {100 * minding.reads:6.1f} "
            f"{100 * plain.reads:16.1f}",
            file=file,
        )


def gap(lru: float, rate: float, best: float) -> str:
    """The share of the difference between LRU and the optimum that a policy gains."""
    return f"{(rate - lru) / (best - lru):.0%}" if best > lru else "-"


if __name__ == "__main__":
    sys.exit(main())
