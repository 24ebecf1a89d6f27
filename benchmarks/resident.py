"""Where every expert has a slot for good: does a token cost more than plain execution of the same kernels?

Method. One model with made weights, all of whose experts are in VRAM, answers the same prompt in turn by
  ours   the library's own stream of tokens
  plain  a loop of a few lines: the same forward and expert kernels, followed by an argmax, in one CUDA graph;
         slots from a table, no counting, no sampler; the host waits for the id and continues
Decoding is greedy; `same_ids` says whether the ids agree. ms/token is from the first new id to the last, the
median with lowest and highest; `ratio` is tokens per second of ours over plain's in the same round, with the
interval that holds the true median with 95 % confidence (ratio.py). The first round warms up. Target: 0.95.

Run: python benchmarks/resident.py [--made qwen3-30b-a3b] [--vram 24GiB] [--tokens 64] [--rounds 12]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from contenders import spread
from decode import prompt_ids
from made import Made
from ratio import Ratio
from report import cuda_device, finish, parser_of

import moe_local
from moe_local.cache.errors import MoeLocalError
from moe_local.offload.engine.graphs import CudaGraphs, Graphs
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.kernels.grouped import GroupedRun
from moe_local.offload.measure.machine import describe
from moe_local.offload.measure.variants import expert_runner
from moe_local.offload.store.residents import Residents

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


class Plain:
    """Answers with a resident model's own weights and kernels, and nothing around them. Does not own the
    model."""

    def __init__(self, model: moe_local.Model, graphs: Graphs) -> None:
        residents = expert_runner(model).token_path
        if not isinstance(residents, Residents):
            raise SystemExit("the experts are not resident on one device, or its kernels do not run here")
        self._residents = residents
        self._store = model.parts.store
        self._engine = model.parts.engine
        self._step = self._engine.make_token_step(None)
        self._graphs = graphs
        self._captured: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}
        self._modules = [m for m in model.hf.modules() if isinstance(m, OffloadedExperts)]

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute a layer's experts for one token, hidden [1, D], straight from their slots."""
        layer = self._residents.layer(experts.index, experts, hidden, 1)
        assert layer is not None
        (launcher,), slots, ids = layer._launchers, layer._slots, index.flatten()
        ranks = torch.arange(len(ids), device=hidden.device)
        run = GroupedRun(launcher, hidden, weights)
        base = self._store.tier.arena.buffer(experts.index, 0)
        run.launch(base, torch.stack([slots.index_select(0, ids), ranks], dim=1))
        return run.result()

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], tokens: int) -> tuple[float, list[int]]:
        """(milliseconds per token after the first, `tokens` ids)."""
        engine = self._engine
        engine.forget()
        row = engine.kv.join()
        runners = [module.runner for module in self._modules]
        try:
            ids = [int(engine.plain_logits(row, list(prompt)).argmax())]
            engine.kv.advance(row, len(prompt))
            for module in self._modules:
                module.attach(self)
            began = time.perf_counter()
            while len(ids) < tokens:
                ids.append(self._next(row, ids[-1]))
            return 1000 * (time.perf_counter() - began) / (tokens - 1), ids
        finally:
            for module, runner in zip(self._modules, runners, strict=True):
                assert runner is not None
                module.attach(runner)
            engine.kv.leave(row)

    def _next(self, row: int, token: int) -> int:
        step = self._step
        place = step._prepare(row, token)
        if place not in self._captured:
            with self._graphs.session():
                step._forward(place)  # lets libraries initialize before the capture
            with self._graphs.session():
                self._graphs.begin()
                following = step._forward(place).argmax(dim=-1)
                self._captured[place] = self._graphs.end(), following
        graph, following = self._captured[place]
        graph.replay()
        self._engine.kv.advance(row, 1)
        return int(following)


def answer(model: moe_local.Model, prompt: Sequence[int], tokens: int) -> tuple[float, list[int]]:
    """As `Plain.answer`, but by the library's stream."""
    with model.stream(list(prompt), max_new_tokens=tokens, **GREEDY) as stream:
        for _ in stream:
            pass
    return 1000 * stream.stats.decode_s / (tokens - 1), list(stream.token_ids)


def measure(
    model: moe_local.Model, graphs: Graphs, *, prompt_tokens: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Let both ways answer in turn; returns their times, the ratio, and whether the ids agree."""
    plain = Plain(model, graphs)
    ways = {"ours": lambda prompt: answer(model, prompt, tokens), "plain": lambda p: plain.answer(p, tokens)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    same = True
    for number in range(rounds + 1):
        prompt = prompt_ids(model, prompt_tokens, number)
        said = {}
        for name in sorted(ways, reverse=number % 2 == 1):
            ms, said[name] = ways[name](prompt)
            if number:
                times[name].append(ms)
        same &= said["ours"] == said["plain"]
    ratio = Ratio.of([1 / ms for ms in times["ours"]], [1 / ms for ms in times["plain"]])
    spreads = {name: spread(ms) for name, ms in times.items()}
    return {"ms_per_token": spreads, "ratio": ratio.to_dict(), "same_ids": same}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    cuda_device("resident.py")
    try:
        made = Made(options.made, options.layers)
        vram = {"vram": options.vram} if options.vram else {}
        with made.load(context=1024, **vram) as model:
            device = model.hf.device
            found = measure(
                model,
                CudaGraphs(device),
                prompt_tokens=options.prompt_tokens,
                tokens=options.tokens,
                rounds=options.rounds,
            )
            about = {"model": model.name, "tokens": options.tokens, "machine": describe(device)}
    except MoeLocalError as error:
        raise SystemExit(f"error: {error}") from error
    for name, ms in found["ms_per_token"].items():
        print(f"{name:6} {ms['median']:.3f} ms a token ({ms['min']:.3f} to {ms['max']:.3f})")
    print(f"ours over plain: {Ratio(**found['ratio'])}{'' if found['same_ids'] else '; THE IDS DIFFER'}")
    finish({"benchmark": "resident", "rounds": options.rounds, **about, **found}, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=12)
    parser.add_argument("--made", default="qwen3-30b-a3b", metavar="NAME", help="as bench's --synthetic")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--vram", help="of the card; default: what is free")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
