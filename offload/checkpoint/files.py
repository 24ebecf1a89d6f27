"""The names of the files of a checkpoint, in a folder or of GGUF, and the index of its shards."""

from __future__ import annotations

import re
from pathlib import Path

from moe_local.cache.errors import CheckpointError, ModelNotFoundError
from moe_local.cache.files import parse_json

CONFIG = "config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GGUF = ".gguf"
GGUF_MAGIC = b"GGUF"
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
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


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only GGUF model (its first part, if split) in the folder `path`.

    None if `path` is neither or has safetensors files. Raises ModelNotFoundError if there are several models.
    """
    if path.is_file():
        return path if is_gguf(path) else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob(f"*{GGUF}"))
    first = [file for file in files if (part := GGUF_PART.fullmatch(file.name)) is None or part[2] == "00001"]
    if len(first) > 1:
        names = ", ".join(file.name for file in first[:3])
        raise ModelNotFoundError(f"{path} holds {len(first)} GGUF models ({names}); name the file itself")
    return first[0] if first else files[0] if files else None


def is_gguf(path: Path) -> bool:
    """Whether the file is a GGUF file by its name or, since Ollama's have other names, by its content."""
    if path.suffix == GGUF:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def parts_of(path: Path) -> list[Path]:
    """All parts of a split model, given one of them; only `path` itself if the model is not split.

    Raises CheckpointError if a part is missing.
    """
    match = GGUF_PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path.parent}: {missing[0]} of {count} parts is missing; get it, too")
    return parts
