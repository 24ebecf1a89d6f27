"""Writing a small file so that a reader sees the old one or the new one, whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write `lines` (each with its newline) as UTF-8: beside the target, to the disk, then into its place.

    Whatever goes wrong, also in `lines` themselves, leaves the old file and nothing else. Raises OSError.
    """
    write_bytes_atomically(path, (line.encode() for line in lines))


def write_bytes_atomically(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    """As `write_atomically`, for bytes."""
    target = Path(path)
    # Not tempfile: its files are for the owner alone, and a result should be as readable as any other.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
