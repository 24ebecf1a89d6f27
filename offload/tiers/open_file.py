"""A file of experts, opened for reading."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import NamedTuple

from moe_local.offload.system.direct_io import PAGE
from moe_local.offload.system.read_at import open_directly, open_for_reading, read_at


class OpenFile(NamedTuple):
    """Descriptors of an open file."""

    plain: int
    direct: int | None
    """Past the page cache; None where that is refused or was not asked for."""

    @classmethod
    def open(cls, path: Path, direct: bool) -> OpenFile:
        """Raises OSError if the file cannot be opened at all."""
        return cls(open_for_reading(path), open_directly(path) if direct else None)

    def read_directly(self, buffer: memoryview, start: int) -> int:
        """Bytes read from the file's byte `start` on: none where that is not for direct access, or fails."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0
        if self.direct is None or (start | len(buffer) | address) % PAGE:
            return 0
        with contextlib.suppress(OSError):  # what the ordinary read will find as well, and tell
            return read_at(self.direct, buffer, start)
        return 0

    def close(self) -> None:
        os.close(self.plain)
        if self.direct is not None:
            os.close(self.direct)
