"""The text output of `moe-local bench`: the floor before the measurement, tables after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_local.cache.keys import format_bytes, three_digits
from moe_local.cli.render import table_lines
from moe_local.offload.measure.floor import Floor
from moe_local.offload.measure.ratio import Ratio
from moe_local.offload.model import Model


def heading(model: Model, floor: Floor) -> Iterator[str]:
    """What is measured, and the floor: the least time per token that the bandwidths allow."""
    plan, weights, speeds = model.plan, floor.weights, floor.bandwidths
    slots = plan.vram_slots if floor.tier == "vram" else plan.ram_slots
    held, experts = plan.slots_per_layer(slots), plan.request.spec.num_experts
    yield f"{model.name}: {plan.mode}, {held} of {experts} experts a layer in {floor.tier.upper()}"
    yield (
        f"floor  {three_digits(floor.ms_per_token)} ms/token: {_size(weights.expert_bytes)} of experts and "
        f"{_size(weights.dense_bytes)} of other weights, once from {floor.tier.upper()} "
        f"at {floor.bytes_per_s / 1e9:.1f} GB/s"
    )
    link = f"link {speeds.h2d / 1e9:.1f} GB/s, " if floor.tier == "vram" else ""
    disk = " (page cache)" if speeds.disk_cached else ""
    yield f"       a miss of {_size(plan.bytes.expert)} more: {link}disk {speeds.disk / 1e9:.2f} GB/s{disk}"


def report(document: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a finished measurement."""
    timed = {name: row for name, row in document["workloads"].items() if row["repeats"]}
    yield ""
    if timed:
        yield from _latencies(timed)
        yield ""
        yield from _parts(timed, document["floor"]["ms_per_token"])
        yield ""
        yield from _cache(timed)
    if document["compare"]:
        yield ""
        yield from _comparison(document)
    yield ""
    peak = document["peak_bytes"]
    vram = f"{_size(peak['vram'])} VRAM, " if document["machine"]["gpu"] else ""
    yield f"peak   {vram}{_size(peak['ram'])} RAM"
    for note in document["notes"]:
        yield f"note   {note}"


def _latencies(workloads: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, row in workloads.items():
        tpot, speed = row["tpot_ms"], row["tokens_per_s"]
        times = [f"{tpot[key]:.2f}" for key in ("mean", "p50", "p95", "p99")]
        rows.append(
            [name, f"{row['ttft_s']:.3f}", *times, f"{speed['prefill']:.1f}", f"{speed['decode']:.1f}"]
        )
    columns = ["workload", "ttft s", "tpot ms", "p50", "p95", "p99", "prefill tok/s", "decode tok/s"]
    yield from table_lines(columns, rows)


def _parts(workloads: Mapping[str, Any], floor: float) -> Iterator[str]:
    """Where a token's milliseconds go."""
    causes = [
        cause
        for cause in next(iter(workloads.values()))["stall_ms_per_token"]
        if any(row["stall_ms_per_token"][cause] for row in workloads.values())
    ]
    rows = []
    for name, row in workloads.items():
        stalls, other = row["stall_ms_per_token"], row["other_ms_per_token"]
        parts = [f"{stalls[cause]:.2f}" for cause in causes]
        bound = row["floor_with_misses_ms_per_token"]
        total = other + sum(stalls.values())
        rows.append([name, f"{total:.2f}", *parts, f"{other:.2f}", f"{floor:.2f}", f"{bound:.2f}"])
    stalled = [f"stall: {cause.replace('_', ' ')}" for cause in causes]
    yield from table_lines(["ms a token", "all", *stalled, "other", "floor", "with misses"], rows)


def _cache(workloads: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, row in workloads.items():
        rates, prefetch, moved = row["hit_rate"], row["prefetch"], row["bytes_per_token"]
        layers = [rate for rate in rates["by_layer"] if rate is not None]
        rows.append(
            [
                name,
                _percent(rates["cold"]),
                _percent(rates["steady"]),
                f"{_percent(min(layers, default=None))} to {_percent(max(layers, default=None))}",
                _size(moved["h2d"]),
                _size(moved["disk"]),
                f"{prefetch['used']} of {prefetch['issued']}",
                str(prefetch["late"]),
                _percent(prefetch["misses_covered"]),
                _size(prefetch["wasted_bytes"]),
            ]
        )
    columns = ["cache", "hits cold", "steady", "by layer", "link/token", "disk/token"]
    yield from table_lines([*columns, "prefetch used", "late", "misses covered", "wasted"], rows)


def _comparison(document: Mapping[str, Any]) -> Iterator[str]:
    """Ablations of the main workload."""
    rows = []
    for row in document["compare"]:
        rates, figures = row["hit_rate"] or {}, row["figures"]
        decode, prefill = Ratio(**row["decode"]), Ratio(**row["prefill"])
        rows.append(
            [
                row["name"],
                f"{figures['tokens_per_s']['decode']:.1f}",
                str(decode),
                str(prefill),
                _percent(rates.get("steady")),
                f"{sum(figures['stall_ms_per_token'].values()):.2f}",
            ]
        )
    columns = ["against as loaded", "tok/s", "decode ratio (95 %)", "prefill ratio (95 %)", "hits steady"]
    yield from table_lines([*columns, "stall ms"], rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _size(nbytes: float) -> str:
    return format_bytes(nbytes) if nbytes else "0"
