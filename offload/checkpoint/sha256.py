"""Compares downloaded files with the hashes that the Hub gave for them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HASH = re.compile(r"[0-9a-f]{64}")


class Hashed(NamedTuple):
    """A file of a checkpoint, and whether its contents have the known hash; None if none is known."""

    path: Path
    right: bool | None


def known_sha256(path: Path) -> str | None:
    """The hash that the Hub gave for this file; None if it is not a weight file in the Hub cache.

    A weight file in the cache is a symbolic link to a blob that is named by its sha256.
    """
    if not path.is_symlink():
        return None
    target = Path(os.readlink(path))
    return target.name if target.parent.name == "blobs" and HASH.fullmatch(target.name) else None


def check_downloads(
    paths: Iterable[Path], progress: Callable[[int, int], None] | None = None
) -> list[Hashed]:
    """Hash the files whose hash is known, several at a time; calls `progress(files done, all files)`.

    A file that cannot be read counts as wrong. Blocks on the disk and the CPU (some 1.5 GB/s per core).
    """
    found: list[Hashed] = []
    files = list(paths)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "sha256") as pool:
        try:
            for hashed in pool.map(_check, files):
                found.append(hashed)
                if progress is not None:
                    progress(len(found), len(files))
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _check(path: Path) -> Hashed:
    known = known_sha256(path)
    if known is None:
        return Hashed(path, None)
    try:
        with open(path, "rb") as content:
            return Hashed(path, hashlib.file_digest(content, "sha256").hexdigest() == known)
    except OSError:
        return Hashed(path, False)
