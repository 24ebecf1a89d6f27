"""The names of the files in a checkpoint folder, and the index of its shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moe_local.cache.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


def read_index(path: Path, remedy: str) -> dict[str, str]:
    """Tensor key -> name of the shard that holds it. Raises CheckpointError, whose line `remedy` ends."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        shards = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt ({type(error).__name__}); {remedy}") from error
    # A name with folders in it could lead out of the checkpoint.
    if not shards or any(name != os.path.basename(name) for name in shards.values()):
        raise CheckpointError(f"{path} is corrupt (it names no files beside it); {remedy}")
    return shards


def first_pickle(names: list[str]) -> str | None:
    """The first of `names` that is a pickled weight file, which moe-local never reads."""
    return next((name for name in sorted(names) if Path(name).suffix in PICKLE_SUFFIXES), None)
