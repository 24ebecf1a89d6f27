"""Processes that are really killed at a moment that a test chooses: before any one effect on the disk,
half-way through a write, or after some time.

A child is forked, so that all modules are imported already. It has only the threads that it starts itself.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMEOUT_S = 120

Work = Callable[[], object]


class _Effects:
    """Records a process's effects on the disk, and kills the process before effect number `kill_at`.

    A write counts as two effects: before it, and when half of it is written. So does opening a file by
    `open`: before it, and when the file is open.
    """

    def __init__(self, kill_at: int | None) -> None:
        self.names: list[str] = []
        self.kill_at = kill_at
        self._lock = threading.Lock()

    def before(self, name: str) -> bool:
        """Record an effect; returns whether the caller must kill the process now."""
        with self._lock:
            self.names.append(name)
            return len(self.names) - 1 == self.kill_at

    def watch(self) -> None:
        """Record effects from now on, until the process ends."""
        for name in (
            "replace",
            "rename",
            "unlink",
            "remove",
            "mkdir",
            "rmdir",
            "ftruncate",
            "fsync",
            "symlink",
        ):
            setattr(os, name, self._watched(name, getattr(os, name)))
        opened, written = os.open, os.write

        def watched_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & WRITING and self.before("open"):
                die()
            return opened(path, flags, *args, **options)

        def watched_write(file: int, data: Any) -> int:
            if self.before("write"):
                die()
            half = len(data) // 2
            if half and self.before("half"):
                # Direct I/O only takes whole pages at page boundaries; other halves need not be tested.
                with suppress(OSError):
                    written(file, memoryview(data)[: half // 4096 * 4096 or half])
                die()
            return written(file, data)

        os.open, os.write = watched_open, watched_write  # type: ignore[assignment]
        self._watch_files()

    def _watch_files(self) -> None:
        opened, effects = open, self

        def watched(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if set(mode) & set("wax+") and effects.before("open"):
                die()
            file = opened(path, mode, *args, **options)
            if set(mode) & set("wax+") and effects.before("opened"):
                die()
            return file

        builtins.open = io.open = watched  # type: ignore[assignment]

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.before(name):
                die()
            return real(*args, **options)

        return call


def die() -> None:
    """Kill this process by SIGKILL, as the system's out-of-memory killer would. Does not return."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(TIMEOUT_S)


def fork(work: Work, *, kill_at: int | None = None, ready: int | None = None) -> int:
    """Run `work` in a child that is killed before effect number `kill_at`; returns the child's process id.

    Its exit status is 0, or 1 after an exception. `ready`: a pipe that gets a byte just before the work
    begins.
    """
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(TIMEOUT_S)  # ends a child that hangs, as a failure
        if ready is not None:
            os.write(ready, b"!")
        _Effects(kill_at).watch()
        work()
        status = 0
    finally:
        os._exit(status)


def effects(work: Work) -> list[str]:
    """The effects on the disk of an undisturbed run, in order; `killed_at` takes the number of one."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(TIMEOUT_S)
        found = _Effects(None)
        real = os.write
        found.watch()
        work()
        names = list(found.names)
        real(writing, " ".join(names).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        names = pipe.read().decode().split()
    assert exit_status(pid) == 0
    return names


def exit_status(pid: int) -> int:
    """Wait for a child to end; returns its exit status, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(work: Work, effect: int) -> bool:
    """Run `work` in a child that is killed before this effect; False if it ended without reaching it."""
    status = exit_status(fork(work, kill_at=effect))
    assert status in (0, -signal.SIGKILL)
    return status != 0


def killed_after(work: Work, delay_s: float) -> bool:
    """Run `work` in a child that is killed `delay_s` after the start; False if it had ended by then."""
    reading, writing = os.pipe()
    pid = fork(work, ready=writing)
    os.close(writing)
    try:
        os.read(reading, 1)
    finally:
        os.close(reading)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    status = exit_status(pid)
    assert status in (0, -signal.SIGKILL)
    return status != 0


class Moments:
    """Kills children at random moments of a work that takes about `length_s`.

    On a busy machine the same work may take many times as long at one time as at another. So the assumed
    length adapts: shorter after a work that ended before it was killed, longer after one that was killed in
    time, which keeps about half of the kills in time.
    """

    def __init__(self, seed: int, length_s: float) -> None:
        self.random = random.Random(seed)
        self._length_s = length_s

    def kill(self, work: Work) -> bool:
        """Run `work` in a child that is killed at a random moment; False if it had ended by then."""
        killed = killed_after(work, self.random.uniform(0, self._length_s))
        self._length_s *= 1.25 if killed else 0.8
        return killed


def duration(work: Work) -> float:
    """The seconds of an undisturbed run."""
    start = time.perf_counter()
    assert exit_status(fork(work)) == 0
    return time.perf_counter() - start


@contextmanager
def served(make: Callable[[], Any]) -> Iterator[str]:
    """Run a server in its own process, so that this one has no threads when it forks; yields its `url`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(10 * TIMEOUT_S)
        os.write(writing, make().url.encode())
        os.close(writing)
        while True:
            signal.pause()
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            yield pipe.read().decode()
    finally:
        os.kill(pid, signal.SIGKILL)
        exit_status(pid)
