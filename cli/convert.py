"""`moe-local pull` and `moe-local convert`: the download and conversion of a first `load`, in advance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.cache.files import file_bytes
from moe_local.cache.keys import format_bytes
from moe_local.cli.completion import model_argument
from moe_local.cli.options import debug_flag, json_flag, load_flags
from moe_local.cli.render import ProgressBar, print_json, print_status
from moe_local.cli.text_file import read_text_file

if TYPE_CHECKING:
    from moe_local.offload.allocation.figures import MixFigures
    from moe_local.offload.expert_file.expert_file import ExpertFile


WORSE = 0.02
"""How much worse than the best mix for a text a mix may be before a note says so; a mix that was chosen
before the text was read stays as it is."""


@click.command()
@model_argument()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the expert file; by default where chat and the others look for it.",
)
@click.option(
    "--calibrate",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    envvar="MOE_LOCAL_CALIBRATE",
    show_envvar=True,
    help="For mixed:BITS: a text file like what the model will read and write, - for stdin. MODEL reads it, "
    "and bits go where they matter most; without it, the weights alone decide.",
)
@click.option("--check", is_flag=True, help="Compare what is there with its checksums, and repair it.")
@json_flag
@load_flags("experts", "vram", "ram", "dense", "context", "device")
@debug_flag
def convert(
    model: str, out: Path | None, calibrate: Path | None, check: bool, as_json: bool, options: dict[str, Any]
) -> None:
    """Convert the experts of MODEL, one by one, to the format they are run in.

    Downloads the model first if need be, and continues where an interrupted conversion stopped. For auto, and
    for calibrating, the budgets, --dense, --context and --device describe where the model will run.

    \b
    Examples:
      moe-local convert mixtral-8x7b --experts int8
      moe-local convert demo --experts mixed:3.5 --calibrate notes.txt
    """
    from moe_local.offload.expert_file.expert_file import ExpertFile

    text = None if calibrate is None else read_text_file(calibrate)
    experts, plan = options.pop("experts", "nf4"), None
    if experts == "auto":
        plan = moe_local.fit(model, experts=experts, **options).check()
    with ProgressBar() as progress:
        if text is not None:
            chosen = experts if plan is None else plan.request.experts
            _calibrate(model, text, chosen, progress, options)
        folder = moe_local.convert(model, out, experts, plan=plan, progress=progress, check=check)
    file = ExpertFile.open(folder)
    found = _mix_figures(model, file)
    if as_json:
        print_json(
            {
                "model": model,
                "folder": str(folder),
                "experts": file.format,
                "num_experts": file.total_experts,
                "bytes": file.total_bytes,
                **({} if found is None else {"mix": found.to_dict()}),
            }
        )
    else:
        size = format_bytes(file.total_bytes)
        click.echo(f"{file.total_experts} experts of {model} in {file.format}, {size}: {folder}")
        if found is not None:
            click.echo("\n".join(found.lines()))
    if text is not None and found is not None and (found.gap or 0) > WORSE:
        print_status(
            f"this mix was not chosen by that text alone, and the best one by it would harm "
            f"{100 * (found.gap or 0):.0f} % less; to choose anew: moe-local rm {model}, or --out FOLDER"
        )


def _calibrate(
    model: str, text: str, experts: str, progress: ProgressBar, options: Mapping[str, Any]
) -> None:
    """Let the model read a text before its mix is chosen. Raises OptionError if `experts` is not a mix."""
    from moe_local.offload.allocation.allocate import check_mixed
    from moe_local.offload.allocation.text import calibrate
    from moe_local.offload.checkpoint.hub import config_of
    from moe_local.offload.checkpoint.spec import model_spec
    from moe_local.offload.options import LoadOptions
    from moe_local.offload.quantize.mix import is_mixed

    chosen = LoadOptions(experts=experts).experts
    if not is_mixed(chosen):
        raise OptionError(f"--calibrate is for --experts mixed:BITS; {chosen} is the same for all experts")
    check_mixed(chosen, model_spec(config_of(model)), model)
    calibrate(model, text, progress=progress, **options)


def _mix_figures(model: str, file: ExpertFile) -> MixFigures | None:
    """The figures of a mix of formats; None if all experts have one format."""
    from moe_local.offload.allocation.figures import mix_figures
    from moe_local.offload.checkpoint.hub import config_of
    from moe_local.offload.checkpoint.spec import model_spec
    from moe_local.offload.quantize.mix import is_mixed

    return mix_figures(model_spec(config_of(model)), file) if is_mixed(file.format) else None


@click.command()
@model_argument()
@json_flag
@debug_flag
def pull(model: str, as_json: bool) -> None:
    """Download MODEL into the Hugging Face cache, safetensors only.

    Continues where an interrupted download stopped, and asks the Hub for a newer version of what is there.

    \b
    Example:
      moe-local pull mixtral-8x7b
    """
    from moe_local.offload.checkpoint.hub import resolve

    folder = resolve(model, update=True)
    if as_json:
        print_json({"model": model, "folder": str(folder), "bytes": weight_bytes(folder)})
    else:
        click.echo(f"{model}, {format_bytes(weight_bytes(folder))}: {folder}")


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors (or else GGUF) files in a checkpoint's folder, or of all parts of a GGUF
    file."""
    from moe_local.offload.checkpoint.files import parts_of

    if folder.is_file():
        files = parts_of(folder)
    else:
        files = [*folder.glob("*.safetensors")] or [*folder.glob("*.gguf")]
    return sum(map(file_bytes, files))
