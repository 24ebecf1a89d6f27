"""Print the figures of the parts of gpu.sh in a few lines, and compare them with their targets."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SHARE_OF_FLOOR = 0.7
RESIDENT = 0.95
ROUND_TRIP = 0.1
OVER_PEER = {"transformers": 10.0, "llama.cpp": 1.5}

Document = Mapping[str, Any]


def floor_ms(document: Document, figures: Document) -> float:
    """The least time of a token: the bytes it read from VRAM, over the link, from RAM and from disk, each at
    the bandwidth measured in the same run; the slowest of these decides.

    Every miss is read from RAM, by the link if the GPU computes it, else by the CPU. `figures`: those of the
    document itself, or of one of the variants that it compares.
    """
    speeds, moved = document["bandwidths"], figures["bytes_per_token"]
    missed = figures["misses_per_token"] * document["plan"]["bytes"]["expert"]
    needed = {"h2d": moved["h2d"], "ram": max(moved["h2d"], missed), "disk": moved["disk"]}
    if document["machine"]["gpu"] is None:
        needed["ram"] = 0
    return max(document["floor"]["ms_per_token"], *(1000 * n / speeds[name] for name, n in needed.items()))


def share(document: Document, figures: Document) -> float:
    """Tokens per second as a share of those of the floor."""
    return floor_ms(document, figures) / float(figures["tpot_ms"]["mean"])


def round_trip(document: Document) -> float:
    """The share of a token's time in which the GPU was idle until the host knew the router's choice."""
    return float(document["stall_ms_per_token"]["sync"] / document["tpot_ms"]["mean"])


def print_part(entry: Document) -> None:
    """Print the figures of a part that has just ended, or the end of its output.

    Figures that cannot be shown raise no error: they are kept in the file, and the next part must run.
    """
    try:
        for line in lines_of(entry):
            print(f"   {line[:200]}")
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        print(f"   its figures cannot be shown: {error!r}")
    sys.stdout.flush()


def lines_of(entry: Document) -> Iterator[str]:
    result = entry["result"] if isinstance(entry["result"], dict) else {}
    if result.get("benchmark") == "latency" and "tpot_ms" in result:
        yield from latency(result)
    elif entry["status"] or "output" in result:
        yield from result.get("output", [])[-6:]
        yield from entry.get("errors", [])[-6:]
    else:
        yield from others(result)


def latency(document: Document) -> Iterator[str]:
    """Lines for a result of `moe-local bench`."""
    plan = document["plan"]
    for name, row in document["workloads"].items():
        if not row["repeats"]:
            continue
        stalls = [f"{cause} {ms:.2f}" for cause, ms in row["stall_ms_per_token"].items() if ms]
        yield (
            f"{name}: {row['tokens_per_s']['decode']:.1f} tok/s, {row['tpot_ms']['mean']:.2f} ms, "
            f"{share(document, row):.2f} of the floor's, TTFT {row['ttft_s']:.3f} s, "
            f"hits {row['hit_rate_timed'] or 0:.0%}, stalls {', '.join(stalls) or 'none'}"
        )
    yield f"{plan['mode']}, slots {plan['slots']}, {document['peak_bytes']['vram'] / 2**30:.1f} GiB VRAM"
    speeds = document["bandwidths"]
    yield ", ".join(f"{name} {speeds[name] / 1e9:.1f} GB/s" for name in ("vram", "h2d", "ram"))
    for row in document["compare"]:
        decode, of_floor = row["decode"]["median"], share(document, row["figures"])
        yield f"{row['name']}: {decode:.2f} of that speed, {of_floor:.2f} of the floor's"
    yield from (note for note in document["notes"] if note.startswith(("interrupted", "other tokens")))


def others(result: Document) -> Iterator[str]:
    """Lines for the results of the other benchmarks: their main figures and comparisons."""
    if result.get("benchmark") in ("gpu_kernels", "gpu_attention"):
        for case in result["cases"]:
            names = ("model", "format", "tokens", "columns")
            about = ", ".join(str(case[name]) for name in names if name in case)
            rows = (case["kernels"] if "kernels" in case else case["calls"]).items()
            found = [f"{name} {row['share_of_read']['median']:.2f}" for name, row in rows if len(row) > 1]
            yield f"{about}: of read {', '.join(found)}"
    if result.get("benchmark") == "decode":
        for row in result["ratios"]:
            yield f"{row['ours']} / {row['peer']}: {row['decode']['median']:.2f} times its speed"
    if result.get("benchmark") == "prefill":
        for row in result["rows"]:
            seconds, over = row["seconds"]["median"], row["time_over_floor"]["median"]
            yield f"{row['name']}, {row['tokens']} tokens: {seconds:.3f} s, {over:.2f} of floor"
    for name in ("ms_per_token", "ratio", "by", "models"):
        if name in result:
            yield f"{name}: {json.dumps(result[name])}"


def targets(found: Document) -> Iterator[tuple[str, float, str, float]]:
    """(name, figure, "at least" or "at most", target) of each target whose part was measured."""
    results = {
        name: entry["result"]
        for name, entry in found.items()
        if entry["status"] == 0 and "benchmark" in (entry.get("result") or {})
    }
    for name in ("mixtral_recorded", "mixtral_recorded_25GBs"):
        if name in results:
            what = f"{name}: share of the floor's tokens a second"
            yield what, share(results[name], results[name]), "at least", SHARE_OF_FLOOR
    if "resident" in results:
        ratio = results["resident"]["ratio"]["median"]
        yield "resident: tokens a second over plain execution's", ratio, "at least", RESIDENT
    if "qwen3_half_by_host" in results:
        what = "qwen3_half_by_host: the host's round trip, of a token"
        yield what, round_trip(results["qwen3_half_by_host"]), "at most", ROUND_TRIP
    for name, least in OVER_PEER.items():
        if name in results:
            best = min(row["decode"]["median"] for row in results[name]["ratios"])
            yield f"tokens a second over {name}'s at its best", best, "at least", least


def print_targets(found: Document) -> None:
    with contextlib.suppress(LookupError, TypeError, ZeroDivisionError):  # a file of another version
        for what, figure, bound, wanted in targets(found):
            holds = figure >= wanted if bound == "at least" else figure <= wanted
            print(f"{what}: {figure:.2f}, {bound} {wanted}: {'holds' if holds else 'MISSED'}")


def main() -> None:
    """Print the figures of result files again."""
    for path in sys.argv[1:]:
        found = json.loads(Path(path).read_text())["parts"]
        for name, entry in found.items():
            print(f"== {name}, status {entry['status']}")
            if entry["status"] is not None:
                print_part(entry)
        print_targets(found)


if __name__ == "__main__":
    main()
