"""Reading from a position in a file, by threads that share its descriptor, on every operating system."""

from __future__ import annotations

import os
import threading

_seeking = threading.Lock()


def open_for_reading(path: str | os.PathLike[str], flags: int = 0) -> int:
    """A descriptor for `read_at`, opened with these additional flags. Raises OSError."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | flags)


def open_directly(path: str | os.PathLike[str]) -> int | None:
    """A descriptor whose reads bypass the page cache, or None if the file cannot be opened in this way."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return open_for_reading(path, flag)
    except OSError:
        return None


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read bytes from `offset` on into `buffer`; returns how many were read, 0 at the end. Raises OSError."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    with _seeking:  # Windows: a descriptor has one position, so one thread reads at a time
        os.lseek(descriptor, offset, os.SEEK_SET)
        found = os.read(descriptor, len(buffer))
    buffer[: len(found)] = found
    return len(found)
