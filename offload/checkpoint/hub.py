"""Finds a model by its alias, Hub id, folder, GGUF file or "demo", and downloads it if necessary."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_local.cache.errors import CheckpointError, ModelNotFoundError, MoeLocalError
from moe_local.offload.checkpoint.files import CONFIG, GGUF, INDEX, SINGLE, first_pickle, is_gguf, read_index
from moe_local.offload.checkpoint.hub_download import (
    HubFile,
    begun,
    download_blobs,
    missing_bytes,
    network_error,
    require_space,
)
from moe_local.offload.checkpoint.registry import DEMO, demo_folder, find_alias, hub_id, not_found, short_name

SMALL_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Suffixes of the config, tokenizer and chat template files in a repository's top folder."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository on the Hub, and the model's short name: its alias if it has one, else its Hub id."""

    repo_id: str
    name: str


def resolve(model: str | Path, *, download: bool = True, update: bool = False) -> Path:
    """The folder or GGUF file with the checkpoint of `model`: an alias, Hub id, folder, GGUF file or "demo".

    A model that is complete in the Hub cache is used without network access; with `update`, the Hub is asked
    for a newer revision. Other models are downloaded: config, tokenizer and the safetensors files that the
    index names, nothing else; an interrupted download is resumed. Blocks, with a bar if stderr is a terminal.

    Raises ModelNotFoundError (no such name; not downloaded and `download` is False), DoesNotFitError (disk),
    CheckpointError (no safetensors) and MoeLocalError (gated, no network).
    """
    found = locate(model)
    if isinstance(found, Path):
        return found
    cached = cached_folder(found.repo_id)
    if cached is not None and not update:
        return cached
    if not download:
        raise ModelNotFoundError(
            f"model {found.name!r} is not on this machine; download it: moe-local pull {found.name}"
        )
    with _hub_errors(found):
        return _download(found, sys.stderr.isatty())


def config_of(model: str | Path, *, to_load: bool = False) -> Any:
    """Transformers' config of `model`, without weights and, if possible, without network access.

    It comes from the folder, the Hub cache, the package (for aliases), or config.json alone from the Hub.
    With `to_load` it is that of the checkpoint that `resolve` would give: if that has to be downloaded, the
    Hub's newest, whatever an earlier look at the model left in the cache. Raises as `resolve` does, and
    CheckpointError for a config that cannot be used.
    """
    from moe_local.offload.checkpoint.checkpoint import parse_config, read_config

    found = locate(model)
    if isinstance(found, Path):
        return read_config(found)
    cached = _cached_file(found.repo_id, CONFIG)
    if cached is not None and (not to_load or cached_folder(found.repo_id) is not None):
        return parse_config(cached)
    alias = find_alias(str(model))
    if alias is not None and not to_load:
        return alias.config()
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_errors(found):
        # Without network this fails at once, whereas a download would retry for long.
        HfApi().model_info(found.repo_id)
        with _quiet_hub():
            return parse_config(Path(hf_hub_download(found.repo_id, CONFIG)))


def locate(model: str | Path) -> Path | HubModel:
    """What `model` names, without opening it: a local folder or GGUF file, or a Hub repository.

    Raises ModelNotFoundError if it names none of these.
    """
    name = str(model).strip()
    if name.lower() == DEMO:
        return demo_folder()
    alias = find_alias(name)
    if alias is not None:
        return HubModel(alias.repo_id, alias.alias)
    folder = Path(name).expanduser()
    if name and (folder.is_dir() or (folder.is_file() and is_gguf(folder))):
        return folder
    if name and folder.is_file():  # models/x.bin would else be taken for a Hub id
        remedy = "a model is an alias, a Hub id, a folder or a GGUF file"
        if (folder.parent / CONFIG).is_file():
            remedy = f"give its folder, {folder.parent}"
        raise ModelNotFoundError(f"{name} is a file, but no GGUF file; {remedy}")
    repo_id = hub_id(name)
    if (repo_id or name).endswith(GGUF):
        raise ModelNotFoundError(f"there is no file {name}; check its path")
    if repo_id is not None:
        return HubModel(repo_id, short_name(repo_id))
    if hub_id(name.rpartition(":")[0]) is not None:  # as llama.cpp and Ollama name a file of a repository
        raise not_found(name, "GGUF files are not downloaded here, only read; download the file and give it")
    raise not_found(name, "no alias, Hub id (org/name), folder or GGUF file")


def on_this_machine(model: str | Path) -> Path | None:
    """The folder or GGUF file that `resolve` gives without a download; None if it would download something.

    Raises ModelNotFoundError as `locate` does.
    """
    found = locate(model)
    return found if isinstance(found, Path) else cached_folder(found.repo_id)


def cached_folder(repo_id: str) -> Path | None:
    """The snapshot of `repo_id` in the Hub cache if all its weights are there, else None."""
    config = _cached_file(repo_id, CONFIG)
    if config is None:
        return None
    folder = config.parent
    if (folder / SINGLE).is_file():
        return folder
    if not (folder / INDEX).is_file():
        return None
    return folder if all((folder / name).is_file() for name in _shards(folder / INDEX)) else None


def _cached_file(repo_id: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, name)
    return Path(path) if isinstance(path, str) else None


def to_download(model: str | Path) -> int:
    """Bytes that `resolve` would download of the Hub's newest revision, less those that are in its cache.

    Asks the Hub for names and sizes, and for the index of the shards. Raises as `resolve` does, except
    DoesNotFitError.
    """
    found = locate(model)
    if isinstance(found, Path):
        return 0
    with _hub_errors(found):
        _, small, shards = _listing(found)
        return missing_bytes(found.repo_id, [*small, *shards])


def _listing(model: HubModel) -> tuple[str, list[HubFile], list[HubFile]]:
    """The newest commit, its small files, and the shards of its weights."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(model.repo_id, files_metadata=True)
    files = {
        file.rfilename: HubFile(
            file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id or ""
        )
        for file in info.siblings or []
        if "/" not in file.rfilename
    }
    small = [name for name in files if _is_small(name)]
    if SINGLE in files:
        shards = [SINGLE]
    elif INDEX in files:
        with _quiet_hub():
            shards = _shards(Path(hf_hub_download(model.repo_id, INDEX, revision=info.sha)))
    else:
        raise _no_safetensors(model, list(files))
    absent = [name for name in shards if name not in files]
    if absent:
        raise CheckpointError(
            f"{model.name}: the Hub repository lacks {absent[0]} ({len(absent)} of {len(shards)} shards); "
            "its owner has to complete it"
        )
    return str(info.sha), [files[name] for name in small], [files[name] for name in shards]


def _download(model: HubModel, progress: bool) -> Path:
    """Download the weights after the small files, so that a snapshot with all its weights is complete."""
    from huggingface_hub import snapshot_download

    commit, small, shards = _listing(model)
    require_space(model.name, model.repo_id, [*small, *shards])
    names = [file.name for file in small]
    with _quiet_hub():
        snapshot_download(model.repo_id, allow_patterns=names)
        download_blobs(model.repo_id, commit, shards, progress)
        return Path(snapshot_download(model.repo_id, allow_patterns=[*names, *(f.name for f in shards)]))


def _is_small(name: str) -> bool:
    consolidated = name.startswith("consolidated") or name == "params.json"
    other_index = name.endswith(".index.json") and name != INDEX
    return Path(name).suffix in SMALL_SUFFIXES and not consolidated and not other_index


def _shards(index: Path) -> list[str]:
    """The names of the shards in an index."""
    return sorted(set(read_index(index, "delete it and pull again").values()))


def _no_safetensors(model: HubModel, names: list[str]) -> CheckpointError:
    pickle = first_pickle(names)
    has = f"only pickled weights ({pickle})" if pickle else "no weights in its top folder"
    return CheckpointError(
        f"{model.name} has {has}; moe-local reads safetensors only: look for another copy of the model"
    )


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Disable huggingface_hub's own progress bars, one per file; ours covers the bytes of all files."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _hub_errors(model: HubModel) -> Iterator[None]:
    """Turn huggingface_hub's errors into errors of one line."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model.repo_id}"
    here, again = "on this machine", "run again"
    if begun(model.repo_id):
        here, again = "whole on this machine", "run again, it continues"
    try:
        yield
    except errors.GatedRepoError as error:
        raise MoeLocalError(
            f"{model.repo_id} is gated: accept its licence at {page} and set HF_TOKEN to that account's token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise not_found(
            model.name, f"no public repository at {page} (a private one needs HF_TOKEN)"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{model.name}: {page} has no config.json, so it is no checkpoint") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = "HF_HUB_OFFLINE is set"
        if not constants.is_offline_mode():
            offline = f"there is no connection to {constants.ENDPOINT}"
        raise MoeLocalError(f"{model.name} is not {here} and {offline}; go online and {again}") from error
    except errors.HfHubHTTPError as error:
        reason = str(error).partition("\n")[0]
        raise MoeLocalError(f"{constants.ENDPOINT} refused {model.name} ({reason}); {again}") from error
    except network_error() as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise MoeLocalError(
            f"no connection to {constants.ENDPOINT} for {model.name} ({reason}); go online and {again}"
        ) from error
