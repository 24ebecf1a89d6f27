"""A link of known speed: reads of experts, limited to a number of bytes per second or forced to the disk."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence


class SlowReads:
    """Replaces os.preadv, and records how long the link was busy.

    With `bytes_per_s` all reads share one link: each ends when it and all earlier reads would have ended at
    that rate. Without it, each read's pages are then dropped from the page cache, so that the next read of
    the same bytes comes from the disk again.
    """

    def __init__(self, read: Callable[..., int], bytes_per_s: float | None) -> None:
        self.busy_s = 0.0
        """Seconds in which some read was in flight."""
        self.bytes = 0
        self._read = read
        self._rate = bytes_per_s
        self._free_at = 0.0
        self._active = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def __call__(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        begin = time.perf_counter()
        with self._lock:
            self._since = begin if self._active == 0 else self._since
            self._active += 1
        count = self._read(file, buffers, offset)
        if self._rate is None:
            os.posix_fadvise(file, offset, count, os.POSIX_FADV_DONTNEED)
        else:
            with self._lock:
                self._free_at = max(self._free_at, begin) + count / self._rate
                until = self._free_at
            time.sleep(max(0.0, until - time.perf_counter()))
        with self._lock:
            self._active -= 1
            self.bytes += count
            if self._active == 0:
                self.busy_s += time.perf_counter() - self._since
        return count


@contextlib.contextmanager
def slow_reads(bytes_per_s: float | None) -> Iterator[SlowReads]:
    """Let all os.preadv calls of this process, as by reads of experts, go through the SlowReads that is
    yielded."""
    plain = os.preadv
    link = SlowReads(plain, bytes_per_s)
    os.preadv = link  # type: ignore[assignment]
    try:
        yield link
    finally:
        os.preadv = plain
