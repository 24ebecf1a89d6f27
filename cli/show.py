"""`moe-local list` and `moe-local show`: the models on this machine, and the details of one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from moe_local.cache.keys import format_bytes
from moe_local.cli.completion import model_argument
from moe_local.cli.options import debug_flag, json_flag
from moe_local.cli.render import count, print_fields, print_json, print_status, print_table
from moe_local.offload.checkpoint.registry import DEMO
from moe_local.offload.system.collector import uncollected

if TYPE_CHECKING:
    from moe_local.cache.stats import RoutedTokens
    from moe_local.cli.library import Conversion, Known
    from moe_local.offload.checkpoint.spec import ModelSpec

MOST_STARVED = 8
"""The most starved experts that `show` names one by one."""


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Name also the aliases that are not downloaded.")
@json_flag
@debug_flag
def list_models(everything: bool, as_json: bool) -> None:
    """List the models on this machine: checkpoints, and experts converted from them.

    \b
    Examples:
      moe-local list
      moe-local list --all --json
    """
    from moe_local.cli.library import all_known, nbytes

    entries = [entry for entry in all_known() if everything or entry.here]
    sizes = [None if entry.checkpoint is None else nbytes(entry.checkpoint) for entry in entries]
    if as_json:
        print_json(
            [
                {
                    "model": entry.model,
                    "checkpoint": None if size is None else {"folder": str(entry.checkpoint), "bytes": size},
                    "expert_files": [conversion.to_dict() for conversion in entry.conversions],
                }
                for entry, size in zip(entries, sizes, strict=True)
            ]
        )
        return
    print_table(
        ["model", "checkpoint", "experts"],
        [
            (
                entry.model,
                "-" if size is None else format_bytes(size),
                ", ".join(map(_brief, entry.conversions)) or "-",
            )
            for entry, size in zip(entries, sizes, strict=True)
        ],
    )
    if not everything and {entry.model for entry in entries} <= {DEMO} and sys.stderr.isatty():
        print_status("moe-local list --all also names what can be downloaded.")


def _brief(conversion: Conversion) -> str:
    note = "" if conversion.complete else " unfinished"
    if len(conversion.formats) > 1:
        note = f" ({', '.join(f'{count} {name}' for name, count in conversion.formats.items())})"
    return f"{conversion.format}{note} {format_bytes(conversion.nbytes)}"


@click.command()
@model_argument()
@json_flag
@debug_flag
@uncollected()
def show(model: str, as_json: bool) -> None:
    """Show the shape of MODEL, its sizes by format, and how its router spreads the load.

    Needs no weights. The load is known after runs, which keep their counts beside the expert file. Experts
    that less than 1 % of their layer's tokens chose are named.

    \b
    Examples:
      moe-local show qwen3-30b-a3b
      moe-local show demo --json
    """
    from moe_local.cli.library import known, nbytes
    from moe_local.offload.checkpoint.hub import config_of
    from moe_local.offload.checkpoint.spec import model_spec

    entry = known(model)
    spec = model_spec(config_of(model))
    routed = _routed(entry)
    size = None if entry.checkpoint is None else nbytes(entry.checkpoint)
    if as_json:
        print_json(_document(entry, spec, size, routed))
        return
    click.echo(f"{model}: {spec.architecture}")
    weights = count(spec.layers[0].expert_numel)
    place = "not on this machine" if size is None else f"{format_bytes(size)}, {entry.checkpoint}"
    rows = [
        ("parameters", f"{count(spec.total_numel)}, {count(spec.active_numel)} active for a token"),
        ("MoE layers", f"{len(spec.layers)} of {spec.num_layers} layers"),
        ("experts", f"{spec.num_experts} per layer, {spec.top_k} per token, {weights} weights each"),
        ("hidden size", str(spec.hidden_size)),
        ("context", f"{spec.max_context} tokens"),
        *(
            (f"in {name}", f"{format_bytes(sizes['experts'])} experts, {format_bytes(sizes['dense'])} others")
            for name, sizes in _sizes(spec).items()
        ),
        ("checkpoint", place),
    ]
    for conversion in entry.conversions:
        rows.append(("expert file", f"{_brief(conversion)}, {conversion.folder}"))
    rows += _load_rows(routed)
    print_fields(rows)


def _sizes(spec: ModelSpec) -> dict[str, dict[str, int]]:
    """Bytes of the experts and of the dense part (as on a GPU) for each format."""
    from moe_local.offload.plan.footprint import dense_bytes, expert_bytes
    from moe_local.offload.quantize.codec import codecs

    return {
        name: {
            "experts": sum(
                layer.num_experts * size
                for layer, size in zip(spec.layers, expert_bytes(spec, name), strict=True)
            ),
            "dense": dense_bytes(spec, name, cuda=True),
        }
        for name in codecs()
    }


def _routed(entry: Known) -> RoutedTokens | None:
    """The router's counts over all runs with an expert file of the model; of several files, those with the
    most tokens."""
    from moe_local.offload.expert_file.usage import read_usage

    found = [usage for usage in (read_usage(c.folder) for c in entry.conversions) if usage is not None]
    return max(found, key=lambda usage: sum(usage.tokens), default=None)


def _load_rows(routed: RoutedTokens | None) -> list[tuple[str, str]]:
    if routed is None:
        return [("router load", "not known before the first run")]
    shares = _shares(routed)
    idlest, busiest = min(map(min, shares)), max(map(max, shares))
    rows = [
        (
            "router load",
            f"over {max(routed.tokens)} tokens, an expert was chosen by {100 * idlest:.1f} to "
            f"{100 * busiest:.1f} % of its layer's",
        )
    ]
    starved = routed.starved
    if starved:
        named = ", ".join(
            f"{e.expert} of layer {e.layer} ({100 * e.share:.2f} %)" for e in starved[:MOST_STARVED]
        )
        more = f" and {len(starved) - MOST_STARVED} more" if len(starved) > MOST_STARVED else ""
        rows.append(("starved", f"{len(starved)} experts under 1 %: {named}{more}"))
    return rows


def _shares(routed: RoutedTokens) -> list[list[float]]:
    """For each layer, the share of its tokens that chose each expert."""
    return [
        [count / tokens if tokens else 0.0 for count in counts]
        for counts, tokens in zip(routed.counts, routed.tokens, strict=True)
    ]


def _document(
    entry: Known, spec: ModelSpec, checkpoint_bytes: int | None, routed: RoutedTokens | None
) -> dict[str, Any]:
    load = None
    if routed is not None:
        load = {
            "tokens": list(routed.tokens),
            "share": _shares(routed),
            "starved": [expert._asdict() for expert in routed.starved],
        }
    return {
        "model": entry.model,
        "architecture": spec.architecture,
        "model_type": spec.model_type,
        "layers": spec.num_layers,
        "moe_layers": len(spec.layers),
        "experts_per_layer": spec.num_experts,
        "top_k": spec.top_k,
        "hidden_size": spec.hidden_size,
        "context": spec.max_context,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "parameters": {"total": spec.total_numel, "active": spec.active_numel, "dense": spec.dense_numel},
        "bytes": _sizes(spec),
        "checkpoint": None
        if entry.checkpoint is None
        else {"folder": str(entry.checkpoint), "bytes": checkpoint_bytes},
        "expert_files": [conversion.to_dict() for conversion in entry.conversions],
        "router_load": load,
    }
