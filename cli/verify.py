"""`moe-local verify`: check that a model's files on disk are as they were written."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_local.cache.errors import CheckpointError, ExpertFileError, ModelNotFoundError, MoeLocalError
from moe_local.cache.keys import format_bytes
from moe_local.cli.completion import model_argument
from moe_local.cli.options import debug_flag, json_flag, load_flags
from moe_local.cli.render import ProgressBar, print_json, print_line

if TYPE_CHECKING:
    from moe_local.offload.checkpoint.checkpoint import Checkpoint
    from moe_local.offload.checkpoint.sha256 import Hashed

NATIVE = "native"

RATE_FROM = 256 * 2**20
"""The fewest bytes for which a reading speed is reported."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of checking one expert file, or the checkpoint."""

    folder: Path
    format: str
    total: int
    """Number of experts, or of the checkpoint's files."""
    nbytes: int
    damage: tuple[dict[str, Any], ...]
    """Details of each damaged expert or file; `text` describes it in one line."""
    note: str = ""
    """A remark, such as why something could not be checked."""
    repaired: bool = False
    rate: float | None = None
    disk: float | None = None
    """Bytes/s of verifying (`rate`) and of only reading the disk (`disk`)."""

    @property
    def ok(self) -> bool:
        return self.repaired or not self.damage

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "experts": self.format,
            "ok": self.ok,
            "total": self.total,
            "bytes": self.nbytes,
            "damaged": list(self.damage),
            "repaired": self.repaired,
            "note": self.note or None,
            "bytes_per_s": self.rate,
            "disk_bytes_per_s": self.disk,
        }


@click.command()
@model_argument()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the expert file, if convert was given one.",
)
@click.option("--repair", is_flag=True, help="Mend what is damaged, from the checkpoint or the Hub.")
@json_flag
@load_flags("experts")
@debug_flag
def verify(model: str, out: Path | None, repair: bool, as_json: bool, options: dict[str, str]) -> None:
    """Compare the converted experts of MODEL, in every format, with their checksums.

    Names every damaged expert and, with --repair, converts those again and no others. With --experts native,
    or where nothing is converted, the checkpoint itself: downloads have a hash each, of other files only
    headers and sizes can be checked. Fails if something is damaged and was not repaired.

    \b
    Examples:
      moe-local verify mixtral-8x7b
      moe-local verify mixtral-8x7b --repair
    """
    with ProgressBar() as progress:
        reports = _reports(model, out, options.get("experts"), progress)
        if repair:
            reports = [report if report.ok else _repair(model, report, progress) for report in reports]
    if as_json:
        print_json(
            {"model": model, "ok": all(r.ok for r in reports), "reports": [r.to_dict() for r in reports]}
        )
    else:
        for report in reports:
            _show(model, report)
    for report in reports:
        if not report.ok:
            flags = f" --experts {NATIVE}" if report.format == NATIVE else f" --out {out}" if out else ""
            kind = CheckpointError if report.format == NATIVE else ExpertFileError
            raise kind(
                f"{model}: {_count(report)} damaged in {report.folder}; check the disk, then repair it: "
                f"moe-local verify {model}{flags} --repair"
            )


def _reports(model: str, out: Path | None, format: str | None, progress: ProgressBar) -> list[Report]:
    from moe_local.cli.library import known
    from moe_local.offload.expert_file.expert_file import MANIFEST
    from moe_local.offload.quantize.codec import codec_for
    from moe_local.offload.quantize.mix import canonical, is_mixed

    if out is not None:
        if not (out / MANIFEST).exists() and not any(out.glob("layer-*.safetensors")):
            raise ModelNotFoundError(
                f"there are no converted experts in {out}; "
                f"convert them: moe-local convert {model} --out {out}"
            )
        return [_verify(out, "", progress)]
    if format is not None:
        format = canonical(format)
        if format != NATIVE and not is_mixed(format):
            codec_for(format)  # refuses unknown names in its own words
    entry = known(model)
    found = [conversion for conversion in entry.conversions if format in (None, conversion.format)]
    if format != NATIVE and found:
        return [_verify(conversion.folder, conversion.format, progress) for conversion in found]
    if format not in (None, NATIVE):
        raise ModelNotFoundError(
            f"there are no experts of {model} in {format} on this machine; "
            f"convert them: moe-local convert {model} --experts {format}"
        )
    if entry.checkpoint is None:
        raise ModelNotFoundError(f"nothing of {model} is on this machine; get it: moe-local pull {model}")
    return [_verify_checkpoint(model, entry.checkpoint, progress)]


def _verify(folder: Path, format: str, progress: ProgressBar) -> Report:
    """Check the expert file in a folder. `format`: its name in the report if the manifest cannot be read."""
    from moe_local.offload.expert_file.expert_file import MANIFEST, read_manifest
    from moe_local.offload.expert_file.verify import find_damage

    if folder.is_dir() and not (folder / MANIFEST).exists():
        return Report(
            folder, format, 0, 0, (), "not finished; its parts are checked when convert goes on with it"
        )
    try:
        file = read_manifest(folder)
    except ExpertFileError as error:
        return Report(folder, format, 0, 0, ({"text": str(error)},))
    start = time.perf_counter()
    damage = find_damage(file, lambda done, total, nbytes: progress("verifying", done, total))
    seconds = time.perf_counter() - start
    rate = disk = None
    if file.total_bytes >= RATE_FROM:
        rate, disk = file.total_bytes / seconds, _disk(folder)
    found = tuple(
        {"layer": d.layer, "expert": d.expert, "what": d.what, "file": str(d.path), "text": str(d)}
        for d in damage
    )
    return Report(folder, file.format, file.total_experts, file.total_bytes, found, rate=rate, disk=disk)


def _disk(folder: Path) -> float | None:
    """The bandwidth of the disk in bytes/s; None if it cannot be measured."""
    from moe_local.offload.plan.bandwidth import disk_bandwidth

    with contextlib.suppress(OSError):
        rate, cached = disk_bandwidth(folder)
        return None if cached else rate
    return None


def _verify_checkpoint(model: str, folder: Path, progress: ProgressBar) -> Report:
    from moe_local.offload.checkpoint.checkpoint import Checkpoint
    from moe_local.offload.checkpoint.sha256 import check_downloads

    checkpoint = Checkpoint.open(folder, model)  # raises for wrong headers and sizes
    files = check_downloads(_files(checkpoint), lambda done, total: progress("hashing files of", done, total))
    known = [file for file in files if file.right is not None]
    note = "the Hub's sha256 compared"
    if not known:
        note = "no checksums are known, only headers and sizes were checked; converted experts have checksums"
    elif len(known) < len(files):
        note = f"the Hub's sha256 compared, which {len(files) - len(known)} files do not have"
    damage = tuple(_wrong(file) for file in known if not file.right)
    return Report(folder, NATIVE, len(files), checkpoint.shards.nbytes, damage, note)


def _wrong(file: Hashed) -> dict[str, Any]:
    return {
        "file": str(file.path),
        "what": "wrong sha256",
        "text": f"{file.path.name}: wrong sha256, not what the Hub sent",
    }


def _files(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.shards.folder / name for name in sorted(checkpoint.shards.sizes)]


def _repair(model: str, report: Report, progress: ProgressBar) -> Report:
    """Repair the damage; returns the new report. Raises MoeLocalError if that is not possible."""
    from moe_local.offload.checkpoint.checkpoint import Checkpoint
    from moe_local.offload.checkpoint.hub import resolve
    from moe_local.offload.conversion import open_experts
    from moe_local.offload.expert_file.repair import repair_experts

    def told(done: int, total: int, nbytes: int) -> None:
        progress("repairing", done, total)

    if report.format == NATIVE:
        again = _fetch_again(model, [Path(damage["file"]).resolve() for damage in report.damage], progress)
    else:
        checkpoint = Checkpoint.open(resolve(model, download=False), model)
        if report.total:
            repair_experts(report.folder, checkpoint, told)
        elif report.format:  # the manifest is damaged; converting rebuilds it from the shards' headers
            open_experts(checkpoint, report.format, report.folder, progress=progress)
        else:
            raise ExpertFileError(report.damage[0]["text"])
        again = _verify(report.folder, report.format, progress)
    if again.damage:
        raise MoeLocalError(
            f"{again.folder} is damaged again after its repair ({again.damage[0]['text']}); "
            "the disk does not keep what is written to it: use another one"
        )
    return Report(
        again.folder, again.format, again.total, again.nbytes, report.damage, report.note, repaired=True
    )


def _fetch_again(model: str, files: list[Path], progress: ProgressBar) -> Report:
    """Download damaged files of the Hub cache again; returns the new report. If a download fails, the old
    files are put back."""
    from moe_local.offload.checkpoint.hub import locate, resolve

    if isinstance(locate(model), Path):
        raise MoeLocalError(
            f"{model} is a folder, and where its files come from is not known; repair it by its Hub name: "
            f"moe-local verify ORG/NAME --experts {NATIVE} --repair"
        )
    aside = [(file, file.with_name(f"{file.name}.damaged")) for file in files if file.exists()]
    try:
        for file, kept in aside:
            file.rename(kept)
        folder = resolve(model, update=True)
    except BaseException:
        for file, kept in aside:
            if not file.exists():
                kept.rename(file)
        raise
    finally:
        for file, kept in aside:
            if file.exists():
                kept.unlink(missing_ok=True)
    return _verify_checkpoint(model, folder, progress)


def _show(model: str, report: Report) -> None:
    what = f"{model} in {report.format}" if report.format else model
    if report.format == NATIVE:
        what = f"{model}, the checkpoint"
    size = f", {format_bytes(report.nbytes)}" if report.nbytes else ""
    if report.damage:
        state = f"{_count(report)} damaged" + (", repaired" if report.repaired else "")
    elif report.total:
        unit = _unit(report)
        state = f"all {report.total} {unit}s are whole" if report.total > 1 else f"its {unit} is whole"
        state += f" ({report.note})" if report.note else ""
    else:
        state = report.note
    if report.rate is not None:
        state += f", read at {report.rate / 1e9:.2f} GB/s"
        state += f" (the disk alone: {report.disk / 1e9:.2f})" if report.disk is not None else ""
    print_line(f"{what}{size}: {state}: {report.folder}")
    for damage in report.damage:
        click.echo(f"  {damage['text']}")


def _count(report: Report) -> str:
    """ "2 of 256 experts are"; if no expert is damaged, "the manifest is" or "a shard is"."""
    damaged = [each for each in report.damage if report.format == NATIVE or each.get("expert") is not None]
    if damaged:
        return f"{len(damaged)} of {report.total} {_unit(report)}s {'is' if len(damaged) == 1 else 'are'}"
    if not report.total:
        return "the manifest is"
    return "a shard is" if len(report.damage) == 1 else f"{len(report.damage)} shard headers are"


def _unit(report: Report) -> str:
    return "file" if report.format == NATIVE else "expert"
