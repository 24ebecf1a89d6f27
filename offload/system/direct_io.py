"""Large reads that bypass the page cache (direct I/O), at the speed of the disk.

The page cache costs a copy of every byte and a fault for every page, which can take longer than the disk,
and evicts pages of other programs. File systems without direct I/O and small reads go through the page cache.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from moe_local.offload.system.hung import Job, work_off
from moe_local.offload.system.pages import PAGE, page_mapping
from moe_local.offload.system.read_at import open_directly, read_at

PIECE = 4 << 20
THREADS = 4
"""Four reads of 4 MiB in flight reach a disk's sequential speed, whatever the sizes of the ranges."""

Memory = Callable[[int], torch.Tensor]
"""Allocates memory: nbytes -> uint8 [nbytes]."""


class Range(NamedTuple):
    """The bytes of a file from `start` on that fill `out`, which is contiguous uint8 on the CPU."""

    path: Path
    start: int
    out: torch.Tensor


class ReadError(Exception):
    """`path` could not be read to the end of a range; the text says why."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(str(why))
        self.path = path


def page_memory(nbytes: int) -> torch.Tensor:
    """New page-aligned memory, uint8 [nbytes], as `page_mapping` makes it."""
    return torch.frombuffer(page_mapping(nbytes), dtype=torch.uint8)[:nbytes]


class PageArena:
    """Memory that is reused: a call returns a block, and `reset` takes all blocks back.

    The n-th block after a reset is the n-th block before it, if that is large enough. The owner must see to
    it that nobody uses blocks from before a reset any more.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._given = 0

    def __call__(self, nbytes: int) -> torch.Tensor:
        if self._given == len(self._blocks):
            self._blocks.append(page_memory(nbytes))
        elif self._blocks[self._given].numel() < nbytes:
            self._blocks[self._given] = page_memory(nbytes)
        self._given += 1
        return self._blocks[self._given - 1][:nbytes]

    def reset(self) -> None:
        self._given = 0


def read_ranges(ranges: Sequence[Range]) -> None:
    """Read all ranges in pieces, several at a time. Raises ReadError, also if a file ends too early.

    Needs no copy if memory and file have the same offset within a page. Raises HungError, as `work_off` does,
    if the disk does not answer.
    """
    if sum(found.out.numel() for found in ranges) < PIECE:
        work_off([Job(found.path, partial(_read, found)) for found in ranges])
        return
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(THREADS):
        buffers.put(page_memory(PIECE + PAGE))
    files = _DirectFiles()

    def read(piece: Range) -> None:
        file, buffer = files.open(piece.path), buffers.get()
        try:
            done = 0 if file is None else _read_directly(file, piece, buffer)
        finally:
            buffers.put(buffer)
        if done < piece.out.numel():  # refused, or near the file's end
            _read(Range(piece.path, piece.start + done, piece.out[done:]))

    pieces = [piece for found in ranges for piece in _pieces(found)]
    try:
        work_off([Job(piece.path, partial(read, piece)) for piece in pieces], THREADS)
    finally:
        files.close()


class _DirectFiles:
    """Descriptors for direct reads, shared by threads of which some may hang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, int | None] = {}
        self._closed = False

    def open(self, path: Path) -> int | None:
        """The file's descriptor, or None if it cannot be read directly."""
        with self._lock:
            if path in self._files:
                return self._files[path]
        file = open_directly(path)  # without the lock, since this may hang while other threads go on
        with self._lock:
            if path not in self._files and not self._closed:
                self._files[path] = file
            elif file is not None:  # another thread has opened it already, or `close` was called
                os.close(file)
            return self._files.get(path)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for file in self._files.values():
                if file is not None:
                    os.close(file)
            self._files.clear()


def _pieces(whole: Range) -> Iterator[Range]:
    """Split a range at multiples of PIECE in the file, and at the first and last page boundary in it."""
    start, end = whole.start, whole.start + whole.out.numel()
    cuts = {
        start,
        end,
        -(-start // PAGE) * PAGE,
        end // PAGE * PAGE,
        *range(start // PIECE * PIECE, end, PIECE),
    }
    for cut, stop in pairwise(sorted(cut for cut in cuts if start <= cut <= end)):
        yield Range(whole.path, cut, whole.out[cut - start : stop - start])


def _read_directly(file: int, piece: Range, buffer: torch.Tensor) -> int:
    """Read a piece's pages, through `buffer` unless `out` is pages, too; returns the number of bytes read."""
    skip, size, address = piece.start % PAGE, piece.out.numel(), piece.out.data_ptr()
    pages = -(-(skip + size) // PAGE) * PAGE
    done = 0
    with suppress(OSError):  # refused, or an error that the ordinary read will meet and report
        if pages == size and address % PAGE == 0:
            return read_at(file, piece.out.numpy().data, piece.start)
        count = read_at(file, buffer.numpy().data[:pages], piece.start - skip)
        done = max(0, min(count - skip, size))
        ctypes.memmove(address, buffer.data_ptr() + skip, done)  # without the GIL, so other threads go on
    return done


def _read(found: Range) -> None:
    view = found.out.numpy().data
    try:
        with open(found.path, "rb", buffering=0) as file:
            file.seek(found.start)
            done = 0
            while done < len(view):
                # One read call takes at most 2 GiB on Linux.
                count = file.readinto(view[done : done + 2**30])
                if not count:
                    raise ReadError(found.path, f"it ends at byte {found.start + done}")
                done += count
    except OSError as error:
        raise ReadError(found.path, error) from error
