"""The results of a measurement as one JSON document."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_local.offload.measure.bench import Bench, comparison, summary, timelines
from moe_local.offload.measure.floor import Floor
from moe_local.offload.measure.machine import describe, peak_bytes
from moe_local.offload.measure.variants import AS_LOADED
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.bandwidth import Bandwidths


def best(before: Bandwidths, after: Bandwidths) -> Bandwidths:
    """The larger of each two bandwidths: a floor says what the hardware can do, not what it did when busy."""
    pick = {name: max(getattr(before, name), getattr(after, name)) for name in ("vram", "ram", "h2d", "disk")}
    return dataclasses.replace(before, **pick)


def document(bench: Bench, floor: Floor, options: LoadOptions, notes: list[str]) -> dict[str, Any]:
    """Plain JSON types, with the main workload's figures at the top level and all workloads' in `workloads`.

    If a Ctrl-C left a workload without a timed run, its timed figures are absent, also at the top level.
    """
    model = bench.model
    own = [measured for measured in bench.results if measured.variant == AS_LOADED]
    figures = {measured.workload.name: summary(measured, floor) for measured in own}
    main, device = own[0], model.hf.device
    top = dict(figures[main.workload.name])
    top.pop("workload")
    plan = model.plan.to_dict()
    compared = comparison([measured for measured in bench.results if measured.workload is main.workload])
    return {
        "benchmark": "latency",
        "model": model.name,
        "workload": main.workload.name,
        "floor": floor.to_dict(),
        **top,
        "peak_bytes": peak_bytes(device),
        "machine": describe(device),
        "interrupted": bench.interrupted,
        "notes": notes + findings(bench, compared),
        "options": dataclasses.asdict(options),
        "plan": {
            name: plan[name]
            for name in ("mode", "bytes", "slots", "moe_layers", "experts_per_layer", "top_k")
        },
        "tokens": bench.tokens,
        "bandwidths": floor.bandwidths.to_dict(),
        "workloads": figures,
        "compare": compared,
        "experts_used": [list(counts) for counts in bench.used.counts],
        "runs": timelines(main),
    }


def findings(bench: Bench, compared: list[dict[str, Any]]) -> list[str]:
    """Remarks that a reader of the figures needs; `compared` is the result of `comparison`."""
    found = []
    main = bench.results[0]
    if bench.interrupted:
        found.append("interrupted: figures are of the runs that were over by then")
    if main.storage and (share := sum(main.storage) / len(main.storage)) < 0.9:
        found.append(
            f"{100 * (1 - share):.0f} % of what was read from disk lay in the page cache, where a model "
            "larger than RAM would not find it"
        )
    if bench.model.plan.mode == "resident":
        found.append("every expert fits, so nothing was moved; --slots N measures as if it did not")
    rows = bench.model.parts.engine.kv.rows
    if rows == 1 and any(m.samples and m.workload.name == "batch" for m in bench.results):
        found.append("the batch was answered one after the other; --parallel N steps its prompts together")
    other = [row["name"] for row in compared if not row["same_ids"]]
    if other:
        found.append(f"other tokens than as loaded: {', '.join(other)}")
    return found
