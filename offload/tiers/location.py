"""Where an expert's bytes lie on disk: in one piece, or scattered over a checkpoint's shards."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

REPAIR = "check the disk, then repair it: moe-local verify MODEL --repair"


class FileRange(NamedTuple):
    """`nbytes` of a file from `offset` on, which belong into an expert's buffer from byte `at` on."""

    path: Path
    offset: int
    nbytes: int
    at: int


class Location(NamedTuple):
    """Where an expert's bytes are: `checksum` is xxh3_64 of them."""

    path: Path
    offset: int
    nbytes: int
    checksum: int

    @property
    def ranges(self) -> tuple[FileRange, ...]:
        return (FileRange(self.path, self.offset, self.nbytes, 0),)

    @property
    def remedy(self) -> str:
        """What to do about damage."""
        return REPAIR


class ScatteredLocation(NamedTuple):
    """Where the parts of an expert are that was never converted. Nobody knows a checksum of theirs."""

    ranges: tuple[FileRange, ...]
    remedy: str

    @property
    def nbytes(self) -> int:
        """Bytes to read; the expert's buffer has gaps between them."""
        return sum(part.nbytes for part in self.ranges)

    @property
    def checksum(self) -> None:
        return None
