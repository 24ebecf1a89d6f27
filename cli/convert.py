"""`moe-local pull` and `moe-local convert`: what `load` does on first use, done beforehand."""

from __future__ import annotations

from pathlib import Path

import click

import moe_local
from moe_local.cache.keys import format_bytes
from moe_local.cli.options import debug_flag, json_flag, load_flags
from moe_local.cli.render import ProgressBar, print_json


@click.command()
@click.argument("model")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the expert file; by default where chat and the others look for it.",
)
@click.option("--check", is_flag=True, help="Compare what is there already with its checksums, and mend it.")
@json_flag
@load_flags("experts")
@debug_flag
def convert(model: str, out: Path | None, check: bool, as_json: bool, options: dict[str, str]) -> None:
    """Convert the experts of MODEL, one by one, to the format they are run in.

    Downloads the model first if need be. Goes on where an interrupted conversion stopped.
    """
    from moe_local.offload.expert_file.expert_file import ExpertFile

    with ProgressBar() as progress:
        folder = moe_local.convert(model, out, **options, progress=progress, check=check)
    file = ExpertFile.open(folder)
    if as_json:
        print_json(
            {
                "model": model,
                "folder": str(folder),
                "experts": file.format,
                "num_experts": file.total_experts,
                "bytes": file.total_bytes,
            }
        )
    else:
        size = format_bytes(file.total_bytes)
        click.echo(f"{file.total_experts} experts of {model} in {file.format}, {size}: {folder}")


@click.command()
@click.argument("model")
@json_flag
@debug_flag
def pull(model: str, as_json: bool) -> None:
    """Download MODEL into the Hugging Face cache, safetensors only.

    Goes on where an interrupted download stopped, and asks the Hub for a newer version of what is there.
    """
    from moe_local.offload.checkpoint.hub import resolve

    folder = resolve(model, update=True)
    if as_json:
        print_json({"model": model, "folder": str(folder), "bytes": weight_bytes(folder)})
    else:
        click.echo(f"{model}, {format_bytes(weight_bytes(folder))}: {folder}")


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors, or else GGUF files, in a checkpoint's folder, or of one file."""
    files = [folder] if folder.is_file() else [*folder.glob("*.safetensors")] or [*folder.glob("*.gguf")]
    return sum(path.stat().st_size for path in files)
