"""The models on this machine: checkpoints in the Hub cache or the package, and converted expert files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_local.cache.errors import ExpertFileError, ModelNotFoundError, MoeLocalError
from moe_local.cache.files import file_bytes
from moe_local.cli.completion import speaks_of_experts
from moe_local.offload.checkpoint.files import parts_of
from moe_local.offload.checkpoint.hub import HubModel, cached_folder, locate
from moe_local.offload.checkpoint.registry import ALIASES, DEMO, demo_folder
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.system.home import expert_file_folder, moe_local_home


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder with an expert file, complete or not."""

    folder: Path
    """<home>/experts/<model>/<format>-<start of the checkpoint's fingerprint>"""
    name: str
    """The model's name when it was converted; for an unfinished conversion, the parent folder's name."""
    nbytes: int
    """On disk, all files together."""
    complete: bool
    formats: Mapping[str, int]
    """How many experts have each format; empty for an unfinished conversion."""

    @property
    def format(self) -> str:
        return self.folder.name.rpartition("-")[0].replace("mixed-", "mixed:")

    def of_checkpoint(self, fingerprint: str) -> bool:
        """Whether it was made from the checkpoint with this fingerprint."""
        return fingerprint.startswith(self.folder.name.rpartition("-")[2])

    def is_called(self, names: set[str]) -> bool:
        """Whether one of these names, in lower case, is that of its model."""
        return bool({self.name.lower(), self.folder.parent.name.lower()} & names)

    def to_dict(self) -> dict[str, str | int | bool | dict[str, int]]:
        """Plain JSON types."""
        return {
            "folder": str(self.folder),
            "format": self.format,
            "bytes": self.nbytes,
            "complete": self.complete,
            "formats": dict(self.formats),
        }


@dataclass(frozen=True, slots=True)
class Known:
    """A model, with its checkpoint and conversions on this machine."""

    model: str
    checkpoint: Path | None
    conversions: tuple[Conversion, ...]

    @property
    def here(self) -> bool:
        return self.checkpoint is not None or bool(self.conversions)


def conversions() -> list[Conversion]:
    """Every finished or unfinished conversion below MOE_LOCAL_HOME, sorted by name and format."""
    folders = sorted(path for path in (moe_local_home() / "experts").glob("*/*") if path.is_dir())
    found = map(_conversion, folders)
    return [conversion for conversion in found if conversion.complete or conversion.nbytes]


def _conversion(folder: Path) -> Conversion:
    try:
        file = ExpertFile.open(folder)
    except ExpertFileError:
        return Conversion(folder, folder.parent.name, nbytes(folder), False, {})
    formats = Counter(layout.format for layer in file.layers for layout in layer.layouts)
    return Conversion(folder, file.name, nbytes(folder), True, formats)


def nbytes(checkpoint: Path) -> int:
    """Bytes of all files below a folder, following links, or of all parts of a GGUF file."""
    files = parts_of(checkpoint) if checkpoint.is_file() else checkpoint.rglob("*")
    return sum(map(file_bytes, files))


def known(model: str) -> Known:
    """A model's files on this machine. Raises ModelNotFoundError if there are none and the name is
    unknown."""
    try:
        found = locate(model)
    except ModelNotFoundError:
        # Perhaps a name by which `list` shows conversions whose checkpoint folder is gone.
        mine = tuple(c for c in conversions() if c.is_called({model.lower()}))
        if not mine:
            raise
        return Known(model, None, mine)
    if isinstance(found, HubModel):
        names = {found.name.lower(), found.repo_id.lower(), _slug(found.repo_id)}
        return Known(model, cached_folder(found.repo_id), _called(names))
    if model.strip().lower() == DEMO:
        return Known(model, found, _called({DEMO}))
    return Known(model, found, _of_folder(found, model))


def _called(names: set[str]) -> tuple[Conversion, ...]:
    return tuple(conversion for conversion in conversions() if conversion.is_called(names))


def _of_folder(folder: Path, model: str) -> tuple[Conversion, ...]:
    """The conversions that a load of this folder would use. Name and fingerprint must match: another folder
    of the same name may hold another model, and a copy under another name has its own conversions."""
    from moe_local.offload.checkpoint.checkpoint import Checkpoint  # needs torch, which `list` does without

    try:
        checkpoint = Checkpoint.open(folder, model)
        place = expert_file_folder(moe_local_home(), checkpoint.name, "", checkpoint.fingerprint)
    except MoeLocalError:  # the checkpoint is damaged
        return ()
    same_name = (found for found in conversions() if found.folder.parent == place.parent)
    return tuple(found for found in same_name if found.of_checkpoint(checkpoint.fingerprint))


def all_known() -> list[Known]:
    """The demo, every alias, other Mixture-of-Experts models in the Hub cache, other conversions."""
    found = conversions()
    entries = []
    repositories = {entry.alias: entry.repo_id for entry in ALIASES.values()}
    repositories |= {repo_id: repo_id for repo_id in _other_repositories()}
    for name in [DEMO, *repositories]:
        names = {name.lower(), repositories.get(name, name).lower(), _slug(repositories.get(name, name))}
        mine = tuple(c for c in found if c.is_called(names))
        found = [c for c in found if c not in mine]
        checkpoint = _demo_or_none() if name == DEMO else cached_folder(repositories[name])
        entries.append(Known(name, checkpoint, mine))
    others: dict[str, list[Conversion]] = {}
    for conversion in found:
        others.setdefault(conversion.name, []).append(conversion)
    return entries + [Known(name, None, tuple(mine)) for name, mine in others.items()]


def _slug(repo_id: str) -> str:
    """A Hub id as a folder's name."""
    return repo_id.replace("/", "--").lower()


def _demo_or_none() -> Path | None:
    try:
        return demo_folder()
    except ModelNotFoundError:
        return None


def _other_repositories() -> list[str]:
    """Ids of complete Mixture-of-Experts models in the Hub cache that have no alias."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    aliased = {entry.repo_id.lower() for entry in ALIASES.values()}
    return sorted(
        repository.repo_id
        for repository in repositories
        if repository.repo_type == "model"
        and repository.repo_id.lower() not in aliased
        and (folder := cached_folder(repository.repo_id)) is not None
        and speaks_of_experts(folder / "config.json")
    )
