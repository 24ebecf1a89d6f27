"""Memory of whole pages, and writes from it that bypass the page cache (direct I/O).

The page cache costs a copy of every byte, and evicts pages of other programs. File systems without direct
I/O and unaligned writes go through the page cache. For reads see `direct_io`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path

PAGE = 4096
"""Offsets, sizes and addresses of direct I/O are multiples of this; no disk requires more."""

HUGE = 4 << 20
"""Bytes from which memory is worth huge pages."""

_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


def page_mapping(nbytes: int) -> mmap.mmap:
    """New page-aligned memory; if large, in huge pages where the system has them.

    It lives as long as there are references to it or to views of it. The faults on a matrix's small pages
    take longer than reading it.
    """
    if os.name == "nt":
        mapping = mmap.mmap(-1, max(nbytes, 1))
    else:  # private, since shared memory has no huge pages
        mapping = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def write_fully(file: int, data: memoryview) -> None:
    """Write all of `data` at the file's position. Direct I/O ends for good at data that is not aligned."""
    while data:
        if not _aligned(data):
            _be_ordinary(file)
        try:
            data = data[os.write(file, data) :]
        except OSError as error:
            if error.errno not in _REFUSALS or not _be_ordinary(file):
                raise


def open_for_writing(path: Path) -> int:
    """The descriptor of a new, empty file, opened for direct I/O where possible. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if not _DIRECT or error.errno not in _REFUSALS:
            raise
    return os.open(path, flags, 0o666)


def _aligned(data: memoryview) -> bool:
    if len(data) % PAGE or data.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % PAGE == 0


def _be_ordinary(file: int) -> bool:
    """Turn direct I/O off for an open file; returns whether it was on."""
    if not hasattr(os, "O_DIRECT"):
        return False
    import fcntl  # not on Windows, which has no O_DIRECT either

    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if not flags & _DIRECT:
        return False
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
    return True
