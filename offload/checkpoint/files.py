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
    """Tensor key -> name of the shard that holds it. Raises CheckpointError; `remedy` ends its message."""
    try:
        weight_map = parse_json(path.read_bytes())["weight_map"]
        shards = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt ({type(error).__name__}); {remedy}") from error
    if not shards or not all(map(is_file_name, set(shards.values()))):
        raise CheckpointError(f"{path} is corrupt (it names no files beside it); {remedy}")
    return shards


def file_inside(folder: Path, name: str) -> Path:
    """The path of file `name` in a folder that need not be trusted. The file may be absent.

    Raises CheckpointError if it is a symbolic link out of the folder: only downloaded files may be read. In
    the Hub cache, links within the model's own folder are allowed.
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
    """Whether `name` is a file name without a path on every operating system, and fits in one line."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:")


def first_pickle(names: list[str]) -> str | None:
    """The first of `names` that is a pickled weight file, which moe-local never reads."""
    return next((name for name in sorted(names) if Path(name).suffix in PICKLE_SUFFIXES), None)
