"""Small files: written so that a reader sees the old one or the new one, whole; read whatever is in them."""

from __future__ import annotations

import glob
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FRESH_S = 10.0
"""A temporary file younger than this may be one that its writer has just made."""


def parse_json(text: bytes | str, **options: Any) -> Any:
    """As json.loads, but ValueError whatever is wrong, endless nesting and endless numbers included."""
    try:
        return json.loads(text, **options)
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def write_atomically(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write `lines` (each with its newline) as UTF-8: beside the target, to the disk, then into its place.

    Whatever goes wrong, also in `lines` themselves, leaves the old file and nothing else; what a writer that
    was killed left beside it goes with the next one. Raises OSError.
    """
    write_bytes_atomically(path, (line.encode() for line in lines))


def write_bytes_atomically(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    """As `write_atomically`, for bytes."""
    target = Path(path)
    # Not tempfile: its files are for the owner alone, and a result should be as readable as any other.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    _remove_leftovers(target)
    try:
        with open(temporary, "xb") as file:
            with suppress(OSError):  # a file system without locks: then nobody removes what is left, either
                _lock(file.fileno(), wait=True)
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def sync_folder(folder: Path) -> None:
    """Bring renames and removals in `folder` to the disk. Windows cannot open a folder and needs none."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among processes that do the same, where the system can lock a folder; leaves no lock file.

    For moments only: it waits for the others. The system frees it when its holder dies. Raises OSError if
    there is no such folder.
    """
    file = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if file is not None:
            with suppress(OSError):  # a file system without locks
                _lock(file, wait=True)
        yield
    finally:
        if file is not None:
            os.close(file)


def _remove_leftovers(target: Path) -> None:
    """What writers of this file left that were killed: a living one holds a lock on its own."""
    if fcntl is None:
        return
    for found in target.parent.glob(f".{glob.escape(target.name)}." + 8 * "[0-9a-f]"):
        with suppress(OSError):  # somebody is writing it, or another removed it
            file = os.open(found, os.O_RDONLY)
            try:
                _lock(file)
                # Its writer may not have come to lock it yet, in its first moments.
                if time.time() - os.fstat(file).st_mtime > FRESH_S:
                    os.unlink(found)
            finally:
                os.close(file)


def _lock(file: int, wait: bool = False) -> None:
    """Lock an open file for as long as it is open. Raises OSError if another has, unless it is to wait."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
