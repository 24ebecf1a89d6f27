"""Where an expert's bytes lie on disk: in one piece, or scattered over a checkpoint's shards."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

REPAIR = "check the disk, then repair it: moe-local verify MODEL --repair"


class FileRange(NamedTuple):
    """`nbytes` of a file from `offset` on, to be read to byte `at` of an expert's buffer."""

    path: Path
    offset: int
    nbytes: int
    at: int


class Location(NamedTuple):
    """Where an expert's bytes are; `checksum` is their xxh3_64."""

    path: Path
    offset: int
    nbytes: int
    checksum: int

    @property
    def ranges(self) -> tuple[FileRange, ...]:
        return (FileRange(self.path, self.offset, self.nbytes, 0),)

    @property
    def remedy(self) -> str:
        """What the user can do about damage, for error messages."""
        return REPAIR


class ScatteredLocation(NamedTuple):
    """Where the parts of an unconverted expert are. No checksum of them is known."""

    ranges: tuple[FileRange, ...]
    remedy: str

    @property
    def nbytes(self) -> int:
        """Bytes to read. In the expert's buffer there are gaps between the parts."""
        return sum(part.nbytes for part in self.ranges)

    @property
    def checksum(self) -> None:
        return None
