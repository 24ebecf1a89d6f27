"""The names of the files in a checkpoint folder, and the index of its shards."""

from __future__ import annotations

from pathlib import Path

from moe_local.cache.errors import CheckpointError
from moe_local.cache.files import parse_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


def read_index(path: Path, remedy: str) -> dict[str, str]:
    """Tensor key -> name of the shard that holds it. Raises CheckpointError, whose line `remedy` ends."""
    try:
        weight_map = parse_json(path.read_bytes())["weight_map"]
        shards = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt ({type(error).__name__}); {remedy}") from error
    if not shards or not all(map(is_file_name, set(shards.values()))):
        raise CheckpointError(f"{path} is corrupt (it names no files beside it); {remedy}")
    return shards


def file_inside(folder: Path, name: str) -> Path:
    """The file of this name in a folder that came from elsewhere. It may be absent.

    Raises CheckpointError if it is a link that leads out of the folder: what is read must be what was got.
    The Hub cache's own links stay within its folder of the model.
    """
    path = folder / name
    if path.is_symlink():
        target, home = path.resolve(), folder.resolve()
        if home.parent.name == "snapshots":
            home = home.parent.parent
        if not target.is_relative_to(home):
            raise CheckpointError(
                f"{path} is a link that leads out of its folder, to {target}; put the file itself there"
            )
    return path


def is_file_name(name: str) -> bool:
    """Whether it names something directly in a folder, on every system, and can be shown in one line."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:")


def first_pickle(names: list[str]) -> str | None:
    """The first of `names` that is a pickled weight file, which moe-local never reads."""
    return next((name for name in sorted(names) if Path(name).suffix in PICKLE_SUFFIXES), None)
