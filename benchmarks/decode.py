"""How fast are tokens generated with fewer expert slots than experts, and what does the memory allow?

Method. The model is loaded once for every configuration (slots x prefetch), all at the same time. Each round
answers the same prompt with every configuration in turn, so that a disturbance hits all alike; the first
round warms up and does not count. A configuration's figure is the median over rounds, with the lowest and
highest. The prompt is text from this repository; greedy, and the ids must agree between configurations.
  floor   bytes that a token must move / the bandwidth measured in this run, before and after the rounds:
          the dense part and a token's experts once from the fastest tier, and the experts that missed, as
          counted, once from the tier below. Nothing overlaps in it but tiers: the slowest tier decides.
On a GPU, --vram bounds the card (24GiB stands for a consumer card).

Run: python benchmarks/decode.py MODEL [--slots 2 4 8] [--prefetch off router] [--tokens 24] [--rounds 5]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import moe_local
from moe_local.cache.files import write_atomically
from moe_local.cache.keys import format_bytes
from moe_local.offload.expert_file.convert import moe_local_home
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.bandwidth import Bandwidths, measure
from moe_local.offload.records import GenerationStats

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Configuration:
    """One way to load the model, and what was measured with it."""

    slots: int | None
    prefetch: str
    model: moe_local.Model
    runs: list[GenerationStats] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.slots or 'all that fit'} slots, prefetch {self.prefetch}"

    def summary(self, bandwidths: Bandwidths) -> dict[str, Any]:
        """Medians over the runs, milliseconds and bytes per token, and the floor beside."""
        runs = self.runs
        ms = [1000 / run.tokens_per_s for run in runs]
        tokens = sum(run.new_tokens for run in runs)
        h2d = sum(run.counts.bytes.h2d for run in runs) / tokens
        disk = sum(run.counts.bytes.disk for run in runs) / tokens
        floor = max(self._fastest_tier_seconds(bandwidths), h2d / bandwidths.h2d, disk / bandwidths.disk)
        return {
            "name": self.name,
            "mode": self.model.plan.mode,
            "slots": self.model.plan.to_dict()["slots"],
            "prefetch": self.prefetch,
            "ms_per_token": {"median": statistics.median(ms), "min": min(ms), "max": max(ms)},
            "floor_ms_per_token": 1000 * floor,
            "ttft_s": statistics.median(run.ttft_s for run in runs),
            "hit_rate": sum(r.hits for r in runs) / max(1, sum(r.hits + r.misses for r in runs)),
            "stall_ms_per_token": 1000 * sum(run.stall_s for run in runs) / tokens,
            "bytes_per_token": {"h2d": h2d, "disk": disk},
        }

    def _fastest_tier_seconds(self, bandwidths: Bandwidths) -> float:
        plan = self.model.plan
        spec, sizes = plan.request.spec, plan.bytes
        per_token = sizes.dense + sum(layer.top_k for layer in spec.layers) * sizes.expert
        return per_token / (bandwidths.ram if plan.request.vram is None else bandwidths.vram)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with contextlib.ExitStack() as stack:
        configurations = [
            Configuration(slots, prefetch, stack.enter_context(load(options, slots, prefetch)))
            for slots in options.slots
            for prefetch in options.prefetch
        ]
        device = configurations[0].model.hf.device
        before = measure(moe_local_home(), device)
        prompt = prompt_ids(configurations[0].model, options.prompt_tokens)
        for number in range(options.rounds + 1):
            for configuration in configurations:
                answer(configuration, prompt, options.tokens, keep=number > 0)
            print(f"round {number} of {options.rounds}", file=sys.stderr)
        after = measure(moe_local_home(), device)
        check_equal(configurations)
        best = fastest(before, after)
        rows = [configuration.summary(best) for configuration in configurations]
        report(configurations[0].model, options, best, rows)


def load(options: argparse.Namespace, slots: int | None, prefetch: str) -> moe_local.Model:
    extra = {"vram": options.vram} if options.vram else {}
    return moe_local.load(
        options.model,
        slots=slots,
        prefetch=prefetch,
        experts=options.experts,
        dense=options.dense,
        context=options.context,
        **extra,
    )


def prompt_ids(model: moe_local.Model, count: int) -> list[int]:
    """Ids of real text; the text's bytes where the model has no tokenizer."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    if model.tokenizer is None:
        return [3 + byte for byte in text.encode()[:count]]
    ids: list[int] = model.tokenizer(text)["input_ids"][:count]
    return ids


def answer(configuration: Configuration, prompt: list[int], tokens: int, *, keep: bool) -> None:
    with configuration.model.stream(
        prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None
    ) as stream:
        for _ in stream:
            pass
    if keep:
        configuration.runs.append(stream.stats)
        configuration.ids = list(stream.token_ids)


def check_equal(configurations: Sequence[Configuration]) -> None:
    for configuration in configurations[1:]:
        if configuration.ids != configurations[0].ids:
            raise SystemExit(f"ids differ between {configurations[0].name} and {configuration.name}")


def fastest(before: Bandwidths, after: Bandwidths) -> Bandwidths:
    """The better of two measurements: the floor is what the hardware can, not what a busy moment left."""
    pick = {name: max(getattr(before, name), getattr(after, name)) for name in ("vram", "ram", "h2d", "disk")}
    return Bandwidths(**pick, measured=before.measured, disk_cached=before.disk_cached)


def report(
    model: moe_local.Model, options: argparse.Namespace, bandwidths: Bandwidths, rows: list[dict[str, Any]]
) -> None:
    print(f"{'configuration':32} {'ms/token':>9} {'min':>8} {'max':>8} {'floor':>8} {'stall':>8} {'hits':>6}")
    for row in rows:
        ms = row["ms_per_token"]
        print(
            f"{row['name']:32} {ms['median']:9.1f} {ms['min']:8.1f} {ms['max']:8.1f} "
            f"{row['floor_ms_per_token']:8.1f} {row['stall_ms_per_token']:8.1f} {row['hit_rate']:6.1%}"
        )
    plan = model.plan.to_dict()
    result = {
        "benchmark": "decode",
        "model": Path(options.model).name,
        "prompt_tokens": options.prompt_tokens,
        "experts": options.experts,
        "expert_bytes": plan["bytes"]["expert"],
        "expert_size": format_bytes(plan["bytes"]["expert"]),
        "moe_layers": plan["moe_layers"],
        "tokens": options.tokens,
        "rounds": options.rounds,
        "bandwidths": bandwidths.to_dict(),
        "configurations": rows,
        "machine": machine(model),
    }
    line = json.dumps(result)
    if options.json:
        write_atomically(options.json, [json.dumps(result, indent=1), "\n"])
    print(line)


def machine(model: moe_local.Model) -> dict[str, Any]:
    device = model.hf.device
    return {
        "machine": bandwidth.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moe_local": moe_local.__version__,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, nargs="+", default=[None])
    parser.add_argument("--prefetch", nargs="+", default=["off", "router"])
    parser.add_argument("--experts", default="nf4")
    parser.add_argument("--dense", default="auto")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vram")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
