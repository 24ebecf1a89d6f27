"""Which way of guessing later experts covers most misses, and what does each covered miss waste?

Method. The steps of a recording (the routes of another engine, or of the demo model reading conversations
that it was not fitted to) are replayed through the product's cache, layer by layer, token by token. At each
layer a predictor guesses the experts of the layer `distance` ahead, as many as a token needs; those that are
absent are loaded at once: the link is not simulated, so the figures are the value of guesses that all arrive
in time.
  router    the later layer's norm and router on this layer's residual (demo model only)
  learned   the same, corrected by what `moe-local calibrate` fits (demo model only)
  history   pairs in this conversation: how often an expert of this layer was used with each one ahead
  last      the experts that the previous token used there, which the cache itself knows
  recall    share of the needed experts that were guessed
  covered   misses that prefetch avoids, as a share of the misses without it; misses of experts that prefetch
            evicted count against it
  wasted    experts loaded and evicted unused, per prefetched expert that was used: the bytes wasted per
            covered miss, in experts

Run: python benchmarks/predictors.py [--routes FILE.csv] [--slots 2 4] [--json FILE]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import finish, parser_of

import moe_local
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.routes import Phase, read_routes
from moe_local.demo.corpus import Corpus
from moe_local.offload.prefetch.calibrate import calibrate
from moe_local.offload.prefetch.correction import Correction
from moe_local.offload.prefetch.discover import Probe
from moe_local.offload.prefetch.recorder import Recorder
from moe_local.offload.prefetch.routers import RouterSite

Step = list[list[int]]
"""The experts that a token uses, by layer, in the router's order."""
Predictor = Callable[[int, int, int], list[int]]
"""(token, current layer, distance) -> experts of the layer `distance` ahead, likeliest first."""

FIT_SEED, JUDGE_SEED = 11, 12
FADE = 0.98
"""Factor by which an expert's counts in the history fade each time the expert is used again."""


@dataclass(frozen=True, slots=True)
class Score:
    """Figures of one predictor at one distance and with one number of slots per layer."""

    predictor: str
    distance: int
    slots: int
    recall: float
    misses: float
    """Misses per token without prefetch."""
    covered: float
    wasted: float


class History:
    """A predictor that counts which experts, some layers apart, the conversation's tokens used together."""

    def __init__(self, steps: Sequence[Step], starts: Sequence[int], experts: int) -> None:
        """`starts`: the first token of each conversation, at which the history is empty."""
        self._steps, self._starts, self._experts = steps, set(starts), experts
        self._pairs: dict[tuple[int, int, int], list[float]] = {}
        self._seen = -1

    def __call__(self, token: int, layer: int, distance: int) -> list[int]:
        if token != self._seen:
            self._learn(token)
        score = [0.0] * self._experts
        for expert in self._steps[token][layer]:
            counts = self._pairs.get((layer, distance, expert))
            if counts is not None:
                total = sum(counts) or 1.0
                score = [a + b / total for a, b in zip(score, counts, strict=True)]
        ranked = sorted(range(self._experts), key=lambda e: -score[e])
        return [e for e in ranked if score[e] > 0][: len(self._steps[token][layer + distance])]

    def _learn(self, token: int) -> None:
        """Count the previous token's pairs; at the start of a conversation, clear the history instead."""
        self._seen = token
        if token in self._starts:
            self._pairs.clear()
            return
        before = self._steps[token - 1]
        for layer, chosen in enumerate(before):
            for distance in DISTANCES:
                if layer + distance < len(before):
                    for expert in chosen:
                        counts = self._pairs.setdefault((layer, distance, expert), [0.0] * self._experts)
                        counts[:] = [FADE * count for count in counts]
                        for later in before[layer + distance]:
                            counts[later] += 1


DISTANCES = (1, 2, 3)


def last(steps: Sequence[Step], starts: Sequence[int]) -> Predictor:
    first = set(starts)
    return lambda token, layer, distance: [] if token in first else list(steps[token - 1][layer + distance])


def score(name: str, steps: Sequence[Step], predictor: Predictor, distance: int, slots: int) -> Score:
    layers = len(steps[0])
    guesses = [
        [predictor(token, layer, distance) for layer in range(layers - distance)]
        for token in range(len(steps))
    ]
    hits = needed = 0
    for step, guessed in zip(steps, guesses, strict=True):
        for layer, experts in enumerate(guessed):
            hits += len(set(experts) & set(step[layer + distance]))
            needed += len(step[layer + distance])
    plain, _ = replay(steps, [[[]] * (layers - distance)] * len(steps), distance, slots)
    misses, cache = replay(steps, guesses, distance, slots)
    used = cache.stats.prefetch_used
    return Score(
        name,
        distance,
        slots,
        recall=hits / needed,
        misses=plain / len(steps),
        covered=1 - misses / plain,
        wasted=cache.stats.prefetch_wasted_bytes / used if used else 0.0,
    )


def replay(
    steps: Sequence[Step], guesses: Sequence[Sequence[Sequence[int]]], distance: int, slots: int
) -> tuple[int, ExpertCache]:
    """The misses of all steps if each guess arrives before its layer is reached; and the cache."""
    cache = ExpertCache([slots] * len(steps[0]), "lru", lambda layer, expert: 1)
    for step, guessed in zip(steps, guesses, strict=True):
        for layer, experts in enumerate(step):
            for expert in cache.acquire(layer, experts).load:
                cache.complete(layer, expert)
            cache.release(layer, experts)
            for expert in guessed[layer] if layer < len(guessed) else ():
                if cache.reserve(layer + distance, expert, keep=guessed[layer]) is not None:
                    cache.complete(layer + distance, expert)
    cache.check_integrity()
    return cache.stats.misses, cache


def recorded(path: Path) -> tuple[list[Step], list[int], int]:
    """(decode steps, the first step of each turn, experts per layer)."""
    routes = read_routes(path)
    steps, starts, turn = [], [], None
    for step in routes.phase(Phase.DECODE):
        if step.turn != turn:
            starts.append(len(steps))
            turn = step.turn
        steps.append([list(layer.experts) for layer in step.layers])
    return steps, starts, routes.num_experts


class Demo:
    """The demo model's routing of conversations, and predictors from its residuals."""

    def __init__(self, tokens: int) -> None:
        with moe_local.load("demo", device="cpu", prefetch="off") as model:
            windows = list(conversations(model.tokenizer, JUDGE_SEED, tokens))
            fitted = list(conversations(model.tokenizer, FIT_SEED, 2 * tokens))
            self.corrections = calibrate(model.hf, fitted, lookahead=max(DISTANCES)).corrections
            with torch.inference_mode():
                with Probe(model.hf) as probe:
                    model.hf(input_ids=torch.tensor([windows[0][:1]]))
                self.sites = probe.sites
                with Recorder(model.hf, self.sites) as recorder:
                    for window in windows:
                        model.hf(input_ids=torch.tensor([window]), use_cache=False)
                chosen = [torch.cat(kept).tolist() for kept in recorder.chosen]
                residuals = [torch.cat(kept) for kept in recorder.residuals]
                self.steps = [[layer[token] for layer in chosen] for token in range(len(chosen[0]))]
                self.starts = [sum(map(len, windows[:i])) for i in range(len(windows))]
                self.router = self._guesses(residuals, {})
                self.learned = self._guesses(residuals, self.corrections)
        self.experts = 8

    def _guesses(
        self, residuals: Sequence[torch.Tensor], corrections: dict[tuple[int, int], Correction]
    ) -> Predictor:
        found: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
        for distance in DISTANCES:
            for layer in range(len(self.sites) - distance):
                site = self.sites[layer + distance]
                assert isinstance(site, RouterSite)
                correction = corrections.get((layer, distance))
                if correction is not None and site.weight is not None:
                    correction = correction.to(site.weight)
                found[layer, distance] = site.route(residuals[layer], correction)[1].tolist()
        return lambda token, layer, distance: found[layer, distance][token]


def conversations(tokenizer: Any, seed: int, tokens: int) -> Iterator[list[int]]:
    corpus, rng, count = Corpus(), random.Random(seed), 0
    while count < tokens:
        messages = []
        for turn in corpus.conversation(rng):
            messages += [{"role": "user", "content": turn.question}]
            messages += [{"role": "assistant", "content": turn.answer}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        count += len(ids)
        yield ids


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.routes:
        steps, starts, experts = recorded(options.routes)
        predictors: dict[str, Predictor] = {}
        model = read_routes(options.routes).model
    else:
        demo = Demo(options.tokens)
        steps, starts, experts, model = demo.steps, demo.starts, demo.experts, "demo"
        predictors = {"router": demo.router, "learned": demo.learned}
    predictors |= {"history": History(steps, starts, experts), "last": last(steps, starts)}
    scores = []
    print(
        f"{model}: {len(steps)} tokens, {len(steps[0])} layers of {experts} experts, "
        f"{len(steps[0][0])} a token"
    )
    print(f"{'':8} {'ahead':>5} {'slots':>5} {'recall':>6} {'misses':>7} {'covered':>7} {'wasted':>6}")
    for slots in options.slots:
        for name, predictor in predictors.items():
            for distance in DISTANCES:
                got = score(name, steps, predictor, distance, slots)
                scores.append(got)
                print(
                    f"{name:8} {distance:5} {slots:5} {got.recall:6.1%} {got.misses:7.2f} {got.covered:7.1%} "
                    f"{got.wasted:6.2f}"
                )
    result = {
        "benchmark": "predictors",
        "model": model,
        "tokens": len(steps),
        "layers": len(steps[0]),
        "experts": experts,
        "top_k": len(steps[0][0]),
        "scores": [{name: getattr(s, name) for name in Score.__slots__} for s in scores],
        "moe_local": moe_local.__version__,
    }
    finish(result, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--routes", type=Path, help="a recording (route_trace v1) instead of the demo model")
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=4000, help="of the demo model")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
