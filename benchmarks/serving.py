"""What does it bring that concurrent requests step together? Tokens a second over HTTP, by clients at a time.

Method. One server in this process, its clients in another, over real sockets and /v1/completions with token
ids. A round sends the same prompts once with each number of clients: a single client sends one after the
other, C clients always have C in flight. The number that begins changes from round to round, and so do the
prompts, so that no cached keys and values can be reused. Decoding is greedy; with --dense fp32, where a row
is rounded alike alone and in a batch, all answers must be the same. The first round warms up and does not
count. Every case begins with an empty cache.
  tok/s    new tokens over the time from the first request to the end of the last answer, prompts included
  ratio    tok/s over those of one client in the same round: the median, and the interval that holds the true
           median with 95 % confidence (ratio.py)
  TTFT     from the request to its first token; TPOT, an answer's time from its first token to its last over
           the tokens between: medians and 95th percentiles over all requests
  brought  misses, and bytes read or copied, per new token, prompts included

Run: python benchmarks/serving.py MODEL [--clients 1 2 4 8] [--slots 4] [--tokens 32] [--rounds 7]
     python benchmarks/serving.py --synthetic mixtral-8x7b --layers 4 --device cpu --dense nf4 --slots 4
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode import write_synthetic
from ratio import Ratio
from report import finish, parser_of

import moe_local
from moe_local.cache.stats import Stats
from moe_local.cli.server.app import Limits, Server
from moe_local.cli.server.web import Web
from moe_local.offload.measure.prompts import prose


@dataclass(slots=True)
class Case:
    """The figures with one number of clients, over the counted rounds."""

    clients: int
    tokens_per_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    misses: int = 0
    hits: int = 0
    nbytes: int = 0
    tokens: int = 0

    def note(self, outcome: dict[str, Any], counts: Stats) -> None:
        self.tokens_per_s.append(outcome["tokens"] / outcome["seconds"])
        self.ttft_s += outcome["ttft_s"]
        self.tpot_s += outcome["tpot_s"]
        self.misses += counts.misses
        self.hits += counts.hits
        self.nbytes += counts.bytes.disk + counts.bytes.h2d
        self.tokens += outcome["tokens"]

    def to_dict(self, one: Case) -> dict[str, Any]:
        return {
            "clients": self.clients,
            "tokens_per_s": _spread(self.tokens_per_s),
            "ratio": Ratio.of(self.tokens_per_s, one.tokens_per_s).to_dict(),
            "ttft_s": _spread(self.ttft_s),
            "tpot_s": _spread(self.tpot_s),
            "misses_per_token": self.misses / self.tokens,
            "bytes_per_token": self.nbytes / self.tokens,
            "hit_rate": self.hits / (self.hits + self.misses),
        }


def _spread(values: list[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {
        "median": statistics.median(ranked),
        "min": ranked[0],
        "max": ranked[-1],
        "p95": ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))],
    }


class Clients:
    """The process of the clients: serve_clients.py."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("serve_clients.py")), url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, clients: int, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(
            json.dumps({"clients": clients, "prompts": prompts, "tokens": tokens}),
            file=self._process.stdin,
            flush=True,
        )
        outcome: dict[str, Any] = json.loads(self._process.stdout.readline())
        return outcome

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Signs:
    """Replaces a missing tokenizer: one character per token, so that clients see each token arrive."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(chr(0x4E00 + token % 0x4000) for token in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.decode([token])


class Background:
    """The server, in its own thread."""

    def __init__(self, model: moe_local.Model, queue: int) -> None:
        self.batcher = model.batcher(queue=queue)
        self._web = Web(Server(model, self.batcher, Limits()), "127.0.0.1", 0)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._web.serve()))
        self._thread.start()
        while not self._web.started:
            time.sleep(0.01)
        self.url = "http://{}:{}".format(*self._web.addresses[0])

    def stop(self) -> None:
        self._web.stop()
        self._thread.join()
        self.batcher.close()


def prompt_ids(model: moe_local.Model, count: int, number: int) -> list[int]:
    """`count` ids of text, whose beginning differs for each `number`."""
    text = f"Part {number}. " + " ".join(itertools.islice(prose(number), 40))
    if isinstance(model.tokenizer, Signs):
        return [3 + byte for byte in text.encode()[:count]]
    ids: list[int] = model.tokenizer(text)["input_ids"][:count]
    return ids


def measure(options: argparse.Namespace, model: moe_local.Model) -> list[Case]:
    # All answers must have the same length, so an end-of-sequence token must not end them.
    model.hf.generation_config.eos_token_id = None
    model.tokenizer = model.tokenizer or Signs()
    cases = [Case(clients) for clients in options.clients]
    server = Background(model, queue=options.requests)
    clients = Clients(server.url)
    try:
        for number in range(options.rounds + 1):
            first = number * options.requests
            prompts = [prompt_ids(model, options.prompt_tokens, first + i) for i in range(options.requests)]
            order = cases[number % len(cases) :] + cases[: number % len(cases)]
            said = set()
            for case in order:
                server.batcher.look(model.parts.store.empty).result()
                server.batcher.look(model.parts.engine.forget).result()
                before = server.batcher.stats()
                outcome = clients.ask(case.clients, prompts, options.tokens)
                said.add(tuple(outcome["answers"]))
                if number:
                    case.note(outcome, server.batcher.stats() - before)
            print(f"round {number} of {options.rounds}", file=sys.stderr)
            if len(said) > 1 and options.dense == "fp32":
                raise SystemExit(f"round {number}: answers differ between numbers of clients")
    finally:
        clients.close()
        server.stop()
    return cases


def report(options: argparse.Namespace, model: moe_local.Model, cases: list[Case]) -> None:
    one = next(case for case in cases if case.clients == 1)
    rows = [case.to_dict(one) for case in cases]
    print(f"{model.name}, {options.slots or 'all'} slots a layer, {options.requests} requests a round of")
    print(f"{options.prompt_tokens} prompt tokens and {options.tokens} new ones, {options.rounds} rounds")
    table = [("clients", "tok/s", "ratio (95 %)", "TTFT ms (p95)", "TPOT ms (p95)", "brought", "MB", "hits")]
    for case, row in zip(cases, rows, strict=True):
        ttft, tpot = row["ttft_s"], row["tpot_s"]
        table.append(
            (
                str(case.clients),
                f"{row['tokens_per_s']['median']:.1f}",
                str(Ratio.of(case.tokens_per_s, one.tokens_per_s)),
                f"{1000 * ttft['median']:.0f} ({1000 * ttft['p95']:.0f})",
                f"{1000 * tpot['median']:.1f} ({1000 * tpot['p95']:.1f})",
                f"{row['misses_per_token']:.2f}",
                f"{row['bytes_per_token'] / 1e6:.3g}",
                f"{row['hit_rate']:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    result = {
        "benchmark": "serve",
        "model": model.name,
        "mode": model.plan.mode,
        "slots": options.slots,
        "dense": options.dense,
        "requests": options.requests,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "rows": rows,
        "machine": platform.platform(),
        "processor": platform.processor() or platform.machine(),
    }
    finish(result, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=7)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--synthetic", help="a model of random weights instead, by the name of its shape")
    parser.add_argument("--layers", type=int, help="of the synthetic model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, help="in a round; default: as many as the most clients")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--vram")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dense", default="auto")
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.synthetic is None):
        parser.error("give either MODEL or --synthetic")
    if options.rounds < 1 or options.tokens < 2:
        parser.error(f"--rounds {options.rounds} and --tokens {options.tokens} measure nothing")
    options.clients = sorted({1, *options.clients})
    options.requests = options.requests or options.clients[-1]
    if options.requests < options.clients[-1]:
        parser.error(f"--requests {options.requests} leave some of {options.clients[-1]} clients idle")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.synthetic:
        options.model = str(write_synthetic(options.synthetic, options.layers))
    chosen = {
        name: getattr(options, name) for name in ("slots", "vram") if getattr(options, name) is not None
    }
    with moe_local.load(
        options.model,
        device=options.device,
        dense=options.dense,
        parallel=options.clients[-1],
        context=max(256, options.prompt_tokens + options.tokens + 16),
        **chosen,
    ) as model:
        report(options, model, measure(options, model))


if __name__ == "__main__":
    main()
