"""What is on this machine: checkpoints in the Hub cache or the package, and converted expert files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moe_local.cache.errors import ExpertFileError, ModelNotFoundError, MoeLocalError
from moe_local.offload.checkpoint import Checkpoint
from moe_local.offload.convert import moe_local_home
from moe_local.offload.expert_file import ExpertFile
from moe_local.offload.hub import HubModel, cached_folder, locate
from moe_local.offload.registry import ALIASES, DEMO, demo_folder, find_alias


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder with an expert file, whole or not."""

    folder: Path
    name: str
    """What the model was called when it was converted; of an unfinished one, the folder's name for it."""
    format: str
    fingerprint: str | None
    """Of the checkpoint it comes from; None while it is unfinished."""
    nbytes: int
    """On disk, all files together."""

    @property
    def complete(self) -> bool:
        return self.fingerprint is not None

    def to_dict(self) -> dict[str, str | int | bool]:
        """Plain JSON types."""
        return {
            "folder": str(self.folder),
            "format": self.format,
            "bytes": self.nbytes,
            "complete": self.complete,
        }


@dataclass(frozen=True, slots=True)
class Known:
    """A model and what of it is on this machine."""

    model: str
    checkpoint: Path | None
    conversions: tuple[Conversion, ...]

    @property
    def here(self) -> bool:
        return self.checkpoint is not None or bool(self.conversions)


def conversions() -> list[Conversion]:
    """Every conversion below MOE_LOCAL_HOME, by name and format."""
    folders = sorted(path for path in (moe_local_home() / "experts").glob("*/*") if path.is_dir())
    return [_conversion(folder) for folder in folders]


def _conversion(folder: Path) -> Conversion:
    size = nbytes(folder)
    try:
        file = ExpertFile.open(folder)
    except ExpertFileError:
        return Conversion(folder, folder.parent.name, folder.name.rpartition("-")[0], None, size)
    return Conversion(folder, file.name, file.format, file.fingerprint, size)


def nbytes(folder: Path) -> int:
    """Bytes of all files below a folder, what links point at included."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def conversions_of(model: str, checkpoint: Path | None) -> tuple[Conversion, ...]:
    """Those made from this model: under any of its names, or from a checkpoint with the same experts."""
    found = conversions()
    names = _names(model)
    named = {c.folder for c in found if {c.name.lower(), c.folder.parent.name.lower()} & names}
    if checkpoint is not None and len(named) < len(found):
        try:
            fingerprint = Checkpoint.open(checkpoint, model).fingerprint
        except MoeLocalError:
            fingerprint = None  # a damaged checkpoint still has its name
        named |= {c.folder for c in found if c.complete and c.fingerprint == fingerprint}
    return tuple(c for c in found if c.folder in named)


def _names(model: str) -> set[str]:
    """What a model may have been called, in lower case."""
    names = {model.strip().lower()}
    alias = find_alias(model)
    entries = [alias] if alias else [e for e in ALIASES.values() if e.repo_id.lower() in names]
    for entry in entries:
        names |= {entry.alias.lower(), entry.repo_id.lower()}
    return names


def checkpoint_of(model: str) -> Path | None:
    """The model's checkpoint, if it is whole on this machine. Raises ModelNotFoundError for unknown names."""
    found = locate(model)
    return cached_folder(found.repo_id) if isinstance(found, HubModel) else found


def known(model: str) -> Known:
    """What of one model is here. Raises ModelNotFoundError if nothing is and the name is unknown."""
    try:
        checkpoint = checkpoint_of(model)
    except ModelNotFoundError:
        # A folder that is gone may have left its conversion.
        leftover = conversions_of(model, None)
        if not leftover:
            raise
        return Known(model, None, leftover)
    return Known(model, checkpoint, conversions_of(model, checkpoint))


def all_known() -> list[Known]:
    """The demo, every alias, other Mixture-of-Experts models in the Hub cache, other conversions."""
    found = conversions()
    entries = []
    for name in [DEMO, *ALIASES, *_other_repositories()]:
        names = _names(name)
        mine = tuple(c for c in found if {c.name.lower(), c.folder.parent.name.lower()} & names)
        found = [c for c in found if c not in mine]
        entries.append(Known(name, _checkpoint_or_none(name), mine))
    others: dict[str, list[Conversion]] = {}
    for conversion in found:
        others.setdefault(conversion.name, []).append(conversion)
    return entries + [Known(name, None, tuple(mine)) for name, mine in others.items()]


def _checkpoint_or_none(name: str) -> Path | None:
    try:
        return demo_folder() if name == DEMO else checkpoint_of(name)
    except ModelNotFoundError:
        return None


def _other_repositories() -> list[str]:
    """Hub ids in the Hub cache, no aliases', with all weights and a config that speaks of experts."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    aliased = {entry.repo_id.lower() for entry in ALIASES.values()}
    return sorted(
        repository.repo_id
        for repository in repositories
        if repository.repo_type == "model"
        and repository.repo_id.lower() not in aliased
        and _speaks_of_experts(cached_folder(repository.repo_id))
    )


def _speaks_of_experts(folder: Path | None) -> bool:
    if folder is None:
        return False
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "expert" in json.dumps([*config, config.get("text_config")])
