"""What does the bookkeeping of a token cost, apart from any copy and any kernel?

Method. An `ExpertCache` of 48 layers x 128 experts, the shape of Qwen3-30B-A3B, is driven as the engine
drives it: acquire a layer's experts, complete what had to be loaded (at once: nothing is copied), release.
  layer      acquire + release of 8 resident experts; one sample is the mean of 48 layers
  all hits   a token of 48 x 8 experts, all resident; one sample is a token
  80 % hits  a token of 48 x 8 with the fewest slots that give 80 % hits; routes are drawn with Zipf
             popularity (exponent 1), the ranks shuffled in each layer, from --seed
  recorded   the same with recorded routes of Qwen3-30B-A3B (48 x 6: it ran at top-6), if they are in
             ../shared/data/routes
  floor      8 dict lookups in a list comprehension: the least that Python can spend on a layer
Every case has one warm-up pass, then passes in rounds over all cases, so that a disturbance hits all of
them alike; medians and 95th percentiles are over all samples. Times are CPU time of the thread: this code
never waits, and CPU time leaves out what other programs take on a busy machine. The garbage collector runs
as it does in the product.

Run: python benchmarks/cache_overhead.py [--policy adaptive] [--rounds 20] [--seed 0] [--json FILE]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import thread_time

from report import finish, parser_of

from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.policies import POLICIES
from moe_local.cache.routes import Phase, read_routes

LAYERS, EXPERTS, TOP_K, TOKENS = 48, 128, 8, 64
HIT_RATE = 0.8
LAYER_TARGET_US, TOKEN_TARGET_US = 15.0, 1000.0
ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT.parent / "shared" / "data" / "routes" / "qwen3-30b-a3b_top6.csv"

Token = Sequence[Sequence[int]]
"""The experts of each layer."""


@dataclass
class Case:
    """One thing to time: `run` makes one pass and returns its samples in seconds."""

    name: str
    what: str
    run: Callable[[], list[float]]
    target_us: float | None = None
    hit_rate: float | None = None
    samples: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        p95 = statistics.quantiles(self.samples, n=20)[-1]
        return {
            "median_us": statistics.median(self.samples) * 1e6,
            "p95_us": p95 * 1e6,
            "samples": len(self.samples),
            "target_us": self.target_us,
            "hit_rate": self.hit_rate,
        }


def bookkeeping(cache: ExpertCache, token: Token) -> None:
    """The engine's calls of the cache for one token, if every copy ended at once."""
    for layer, experts in enumerate(token):
        for expert in cache.acquire(layer, experts).load:
            cache.complete(layer, expert)
        cache.release(layer, experts)


def pass_over(cache: ExpertCache, tokens: Sequence[Token]) -> list[float]:
    samples = []
    for token in tokens:
        start = thread_time()
        bookkeeping(cache, token)
        samples.append(thread_time() - start)
    return samples


def zipf_tokens(seed: int) -> list[Token]:
    """TOKENS tokens of LAYERS x TOP_K distinct experts; the expert of rank r is drawn with weight 1 / r."""
    chance = random.Random(seed)
    weights = [1 / rank for rank in range(1, EXPERTS + 1)]
    ranks = [chance.sample(range(EXPERTS), EXPERTS) for _ in range(LAYERS)]
    tokens: list[Token] = []
    for _ in range(TOKENS):
        token = []
        for order in ranks:
            chosen: dict[int, None] = {}
            while len(chosen) < TOP_K:
                chosen[chance.choices(order, weights)[0]] = None
            token.append(list(chosen))
        tokens.append(token)
    return tokens


def hit_rate(slots: int, policy: str, tokens: Sequence[Token]) -> float:
    """The hit rate of a second pass over the tokens."""
    cache = ExpertCache([slots] * LAYERS, policy)
    pass_over(cache, tokens)
    before = cache.stats.snapshot()
    pass_over(cache, tokens)
    return (cache.stats.snapshot() - before).hit_rate or 0.0


def missing_case(name: str, what: str, policy: str, tokens: Sequence[Token]) -> Case:
    """Passes over the tokens with the fewest slots that give HIT_RATE."""
    top_k = max(len(experts) for token in tokens for experts in token)
    choices = range(top_k, EXPERTS + 1)
    slots = choices[bisect_left(choices, HIT_RATE, key=lambda slots: hit_rate(slots, policy, tokens))]
    cache = ExpertCache([slots] * LAYERS, policy)
    rate = hit_rate(slots, policy, tokens)
    return Case(name, f"{what}, {slots} slots", lambda: pass_over(cache, tokens), TOKEN_TARGET_US, rate)


def resident_cases(policy: str) -> list[Case]:
    cache = ExpertCache([32] * LAYERS, policy)
    token = [list(range(layer % 4, 32, 4)) for layer in range(LAYERS)]

    def layer_pass() -> list[float]:
        return [sample / LAYERS for sample in pass_over(cache, [token] * TOKENS)]

    def token_pass() -> list[float]:
        return pass_over(cache, [token] * TOKENS)

    def floor_pass() -> list[float]:
        table = {expert: expert for expert in range(32)}
        samples = []
        for _ in range(TOKENS):
            start = thread_time()
            for experts in token:
                [table[expert] for expert in experts]
            samples.append((thread_time() - start) / LAYERS)
        return samples

    return [
        Case("floor", "8 dict lookups", floor_pass),
        Case("layer", "acquire + release of 8 resident experts", layer_pass, LAYER_TARGET_US, 1.0),
        Case("all_hits", "a token, 48 x 8, all hits", token_pass, TOKEN_TARGET_US, 1.0),
    ]


def cases(policy: str, seed: int) -> list[Case]:
    made = resident_cases(policy)
    made.append(missing_case("zipf", "a token, 48 x 8, Zipf", policy, zipf_tokens(seed)))
    if RECORDED.exists():
        # Prompts have no routes in the last layer, so only decode steps are whole tokens.
        steps = read_routes(RECORDED).phase(Phase.DECODE)
        tokens = [[route.experts for route in step.layers] for step in steps]
        made.append(missing_case("recorded", "a token, 48 x 6, Qwen3-30B-A3B", policy, tokens))
    return made


def commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def row(case: Case) -> str:
    figures = case.summary()
    rate = "" if case.hit_rate is None else f"{case.hit_rate:6.1%}"
    target = "" if case.target_us is None else f"{case.target_us:8.0f}"
    return f"{case.what:42} {rate:>7} {figures['median_us']:9.2f} {figures['p95_us']:9.2f} {target:>8}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, rounds=20)
    parser.add_argument("--policy", default="adaptive", choices=list(POLICIES))
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic routes")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} measures nothing; give 1 or more")
    measured = cases(options.policy, options.seed)
    for case in measured:
        case.run()
    for _ in range(options.rounds):
        for case in measured:
            case.samples += case.run()
    print(f"{'microseconds':42} {'hits':>7} {'median':>9} {'p95':>9} {'target':>8}")
    for case in measured:
        print(row(case))
    result = {
        "benchmark": "cache_overhead",
        "commit": commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "policy": options.policy,
        "clock": "CPU time of the thread",
        "rounds": options.rounds,
        "seed": options.seed,
        "cases": {case.name: case.summary() for case in measured},
    }
    finish(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
