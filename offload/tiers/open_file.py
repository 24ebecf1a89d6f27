"""A file of experts, opened for reading."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import NamedTuple

from moe_local.offload.system.pages import PAGE
from moe_local.offload.system.read_at import open_directly, open_for_reading, read_at


class OpenFile(NamedTuple):
    """Descriptors of an open file."""

    plain: int
    direct: int | None
    """For reads past the page cache; None if that was refused or not asked for."""

    @classmethod
    def open(cls, path: Path, direct: bool) -> OpenFile:
        """Raises OSError if the file cannot be opened at all."""
        return cls(open_for_reading(path), open_directly(path) if direct else None)

    def read_directly(self, buffer: memoryview, start: int) -> int:
        """Read past the page cache from byte `start` on; the bytes read, 0 if that is impossible or fails."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0
        if self.direct is None or (start | len(buffer) | address) % PAGE:
            return 0
        with contextlib.suppress(OSError):  # the ordinary read will meet the same error and report it
            return read_at(self.direct, buffer, start)
        return 0

    def close(self) -> None:
        os.close(self.plain)
        if self.direct is not None:
            os.close(self.direct)
