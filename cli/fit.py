"""`moe-local fit`: whether a model fits, where its parts go, and how fast that can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

import moe_local
from moe_local.cache.keys import format_bytes, three_digits
from moe_local.cli.completion import model_argument
from moe_local.cli.options import debug_flag, json_flag, load_flags
from moe_local.cli.render import count, print_fields, print_json, print_line
from moe_local.offload.system.collector import uncollected

if TYPE_CHECKING:
    from moe_local.offload.plan.plan import Plan


@click.command()
@model_argument()
@json_flag
@load_flags("vram", "ram", "slots", "experts", "dense", "context", "parallel", "device")
@debug_flag
@uncollected()
def fit(model: str, as_json: bool, options: dict[str, Any]) -> None:
    """Say whether MODEL fits, where its parts go and how fast it may be, without its weights.

    --vram 24GiB plans for a CUDA card of that size, on any machine, and 2x24GiB for two of them; without it,
    the plan is for this machine. Exit code 3 means that MODEL does not fit; the output then says by how much,
    and names the nearest setting that does.

    \b
    Examples:
      moe-local fit mixtral-8x7b
      moe-local fit qwen3-30b-a3b --vram 8GiB --ram 32GiB --json
    """
    plan = moe_local.fit(model, **options)
    if as_json:
        print_json(plan.to_dict())
    else:
        show_plan(plan)
    plan.check()


def show_plan(plan: Plan) -> None:
    """Print a plan as text on stdout."""
    from moe_local.offload.quantize.mix import is_mixed

    request, spec, sizes = plan.request, plan.request.spec, plan.bytes
    each = ("up to " if is_mixed(request.experts) else "") + format_bytes(sizes.expert)
    print_line(
        f"{request.model}: {spec.architecture}, {count(spec.total_numel)} parameters "
        f"({count(spec.active_numel)} active), {len(spec.layers)} MoE layers of {spec.num_experts} experts, "
        f"{spec.top_k} per token"
    )
    rows = [
        ("budget", _budget(plan)),
        ("dense part", f"{format_bytes(sizes.dense)} ({request.dense})"),
        ("KV cache", f"{format_bytes(sizes.kv)} ({request.context_text})"),
        ("workspace", f"{format_bytes(sizes.workspace)} (prompts in chunks of {plan.chunk} tokens)"),
        ("experts", f"{format_bytes(sizes.experts_total)} ({request.experts}, {each} each)"),
    ]
    if request.snapshot_bytes:
        snapshots = f"{format_bytes(request.snapshot_bytes)} of RAM (of states, for later turns)"
        rows.insert(3, ("snapshots", snapshots))
    if is_mixed(request.experts):
        rows.append(("mix", _mix(plan)))
    if plan.fits:
        rows += [(f"card {number}", _card(plan, number)) for number in range(len(plan.cards))]
        rows += [("slots", _slots(plan)), ("mode", _mode(plan)), ("speed", _speed(plan))]
    else:
        rows += [("fits", f"no, {format_bytes(plan.shortfall_bytes)} too much")]
        if plan.nearest:
            rows += [("nearest", plan.nearest)]
    print_fields(rows)


def _mix(plan: Plan) -> str:
    """The mix's formats, as far as they are known without the weights, and the expected loss of quality."""
    from moe_local.offload.plan.auto import expected_nats
    from moe_local.offload.quantize.mix import even_mix

    spec = plan.request.spec
    mix = plan.request.mix or even_mix(plan.request.experts, spec)
    counts, experts = mix.counts(), sum(mix.counts().values())
    shares = ", ".join(f"{_percent(count / experts)} {name}" for name, count in counts.items())
    percent = 100 * math.expm1(expected_nats(spec, mix.bits(spec)))
    return f"{mix.bits(spec):.2f} bits a weight: {shares} (perplexity up some {percent:.2g} %)"


def _percent(share: float) -> str:
    """Format a share above 0; unless it is 1, it is not rounded to 0 % or 100 %."""
    whole = round(100 * share)
    if share < 1 and whole in (0, 100):
        return "< 1 %" if whole == 0 else "> 99 %"
    return f"{whole} %"


def _budget(plan: Plan) -> str:
    ram = f"{format_bytes(plan.request.ram)} RAM"
    if plan.request.vram is None:
        return ram
    cards = plan.request.cards or (plan.request.vram,)
    return f"{' + '.join(format_bytes(card) for card in cards)} VRAM, {ram}"


def _card(plan: Plan, number: int) -> str:
    found = plan.on_card(number)
    (first, last), (least, most) = found["layers"], found["slots"]
    slots = str(least) if least == most else f"{least} or {most}"
    return f"layers {first} to {last}, {slots} experts per MoE layer, {format_bytes(found['used'])} in all"


def _slots(plan: Plan) -> str:
    tiers = [("RAM", plan.ram_slots)]
    if plan.request.vram is not None:
        tiers.insert(0, ("VRAM", plan.vram_slots))
    if plan.mode == "resident":  # the lower tiers are only passed through while loading
        tiers = tiers[:1]
    held = ", ".join(f"{_count(plan, slots)} in {tier}" for tier, slots in tiers)
    return f"{held}, of {plan.request.spec.num_experts} experts per MoE layer"


def _count(plan: Plan, slots: Sequence[int]) -> str:
    least, most = plan.slots_per_layer(slots), max(slots)
    return str(least) if least == most else f"{least} or {most}"


def _mode(plan: Plan) -> str:
    share = f"{100 * plan.resident_fraction:.0f} % of the experts"
    fastest = "RAM" if plan.request.vram is None else "VRAM"
    return {
        "resident": f"resident: all experts stay in {fastest}",
        "offload": f"offload: {share} in VRAM, all of them in RAM",
        "disk": f"disk: {share} in {fastest}, what RAM cannot hold is read from disk",
    }[plan.mode or "disk"]


def _speed(plan: Plan) -> str:
    said = ["assumed bandwidths" if plan.assumed else "bandwidths measured here"]
    if plan.mode != "resident":
        said.append(f"{three_digits(plan.resident_tokens_per_s)} if all experts were in the fastest memory")
    return f"about {three_digits(plan.tokens_per_s or 0.0)} tokens/s ({'; '.join(said)})"
