"""`moe-local rm`: free disk space."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from moe_local.cache.errors import ModelNotFoundError, MoeLocalError, OptionError
from moe_local.cache.files import in_use, lock_file, locked
from moe_local.cache.keys import format_bytes
from moe_local.cli.completion import model_argument
from moe_local.cli.options import debug_flag, json_flag
from moe_local.cli.render import print_json


@click.command()
@model_argument()
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--weights", is_flag=True, help="Also remove the download in the Hugging Face cache.")
@json_flag
@debug_flag
def rm(model: str, yes: bool, weights: bool, as_json: bool) -> None:
    """Remove the converted experts of MODEL, and say how much disk space that freed.

    The checkpoint stays, so the next run converts again, unless --weights removes it, too. Folders that
    moe-local did not make are never touched, nor is what a running process has loaded.

    \b
    Examples:
      moe-local rm mixtral-8x7b
      moe-local rm mixtral-8x7b --weights --yes
    """
    from moe_local.cli.library import known

    entry = known(model)
    folders = [conversion.folder for conversion in entry.conversions]
    freed = sum(conversion.nbytes for conversion in entry.conversions)
    download = _download(model) if weights else None
    if download is not None:
        freed += download.expected_freed_size
    if not folders and download is None:
        raise ModelNotFoundError(f"there is nothing to remove: no converted experts of {model} are here")
    what = " and ".join(["the converted experts"] * bool(folders) + ["the download"] * (download is not None))
    _confirm(f"Remove {what} of {model}, {format_bytes(freed)}?", yes)
    snapshots = [] if download is None else [at for repo in download.repos for at in repo.glob("snapshots/*")]
    for folder in [*folders, *snapshots]:
        if in_use(folder):
            raise MoeLocalError(
                f"{folder} is in use by a process that has {model} loaded; end that first, then remove it"
            )
    for folder in folders:
        _remove(folder)
    if download is not None:
        download.execute()
    if as_json:
        print_json({"model": model, "removed": [str(folder) for folder in folders], "freed_bytes": freed})
    else:
        click.echo(f"freed {format_bytes(freed)}")


def _remove(folder: Path) -> None:
    """Remove a conversion, and its parent folder if that is left empty. Raises MoeLocalError while a process
    is converting into it."""
    try:
        with locked(folder, timeout_s=0):
            shutil.rmtree(folder)
            lock_file(folder).unlink(missing_ok=True)
    except TimeoutError:
        raise MoeLocalError(
            f"{folder} is being converted by another process; wait for it or stop it"
        ) from None
    except OSError as error:
        raise MoeLocalError(f"{folder} cannot be removed: {error.strerror or error}") from error
    if not any(path.is_dir() for path in folder.parent.iterdir()):
        _forget(folder.parent)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _forget(folder: Path) -> None:
    """Remove the measured sensitivities that mixes were chosen by, unless a process is measuring them."""
    for name in {path.name.partition(".")[0] for path in folder.glob("sensitivity-*")}:
        with suppress(TimeoutError), locked(folder / f"{name}.json", timeout_s=0):
            for path in folder.glob(f"{name}.*"):
                path.unlink(missing_ok=True)


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise OptionError("rm asks before it removes, and stdin is not a terminal; add --yes")
    click.confirm(question, abort=True, err=True)


def _download(model: str) -> Any:
    """huggingface_hub's strategy to delete all cached revisions of the model; None if there are none."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from moe_local.offload.checkpoint.hub import locate

    found = locate(model)
    if isinstance(found, Path):
        raise OptionError(f"--weights removes downloads only; {model} is the folder {found}, yours to remove")
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None
    revisions = [
        revision.commit_hash
        for repository in cache.repos
        if repository.repo_id == found.repo_id and repository.repo_type == "model"
        for revision in repository.revisions
    ]
    return cache.delete_revisions(*revisions) if revisions else None
