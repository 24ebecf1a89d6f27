"""Reads experts from disk to host memory: reader threads, priorities, cancellation.

The engine's thread starts, joins and cancels loads; reader threads only read. A load is cut into pieces
so that demand overtakes queued prefetches within a few megabytes (measured: neither priorities nor pieces
alone gain anything).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from moe_local.cache.errors import TransferError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.system.patience import SLOW, Patience
from moe_local.offload.system.read_at import read_at
from moe_local.offload.tiers.checksum import RunningChecksum
from moe_local.offload.tiers.device import Copied
from moe_local.offload.tiers.location import FileRange, Location, ScatteredLocation
from moe_local.offload.tiers.open_file import OpenFile

logger = logging.getLogger(__name__)

DEMAND = 0
"""Priority of a load that a kernel waits for; prefetches have 1 and up, more for farther layers."""

DAMAGED = "has a wrong checksum: the file is damaged"
CLOSING_S = 10.0
"""How long `close` waits for reads in flight; one from a disk that hangs may never return."""
STUCK = (
    "is still being read {:.0f} s after the model was closed; its memory stays taken until the disk answers"
)
GONE = "is not there any more; load the model again, which makes or asks for what is missing"
CUT_OFF = "is cut off: the file became shorter after it was opened"


class LoadState(Enum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Load:
    """One expert on its way into one slot. Created by a source, read by the engine's thread."""

    __slots__ = (
        "cancelled",
        "cause",
        "error",
        "event",
        "in_flight",
        "joined",
        "key",
        "left",
        "moved",
        "nbytes",
        "priority",
        "state",
    )

    def __init__(self, key: ExpertKey, nbytes: int, priority: int) -> None:
        self.key = key
        self.nbytes = nbytes
        self.priority = priority
        self.state = LoadState.QUEUED
        self.moved = 0
        """Bytes read or copied so far."""
        self.error: TransferError | None = None
        self.event: Copied | None = None
        """The end of its copy, once the copy has been issued; None for loads that end in host memory."""
        self.cause = "disk"
        """The cause that a wait for this load is charged to, a field of StallSeconds."""
        self.joined = False
        """Whether a layer asked for the expert while the load was in flight."""
        self.cancelled = False
        """Whether it was asked to stop; pieces in flight are still written."""
        self.left = 0
        """Pieces not read yet."""
        self.in_flight = 0
        """Pieces being read at this moment."""

    @property
    def finished(self) -> bool:
        """Whether nothing writes to the slot any more."""
        return self.state in (LoadState.DONE, LoadState.FAILED, LoadState.CANCELLED)


class Source(Protocol):
    """Loads the misses of a tier. Used by one thread."""

    finished: deque[Load]
    """Loads that have ended and that the owner has not popped yet."""

    @property
    def busy(self) -> bool:
        """Whether any load is in flight, as of the last poll."""

    def start(self, key: ExpertKey, slot: int, priority: int) -> Load:
        """Start loading `key` into the slot. Returns at once; an error fails the load."""

    def promote(self, load: Load, priority: int) -> None:
        """Serve a load that was started earlier at a more urgent priority. Never reads twice.

        A load that was cancelled stays so; the priority is then that of its restart, if there is one.
        """

    def cancel(self, load: Load) -> None:
        """Stop as soon as possible; the slot is free only once the load has appeared in `finished`."""

    def poll(self) -> None:
        """Let the source do what it has to do in this thread."""

    def wait(self, seconds: float) -> None:
        """Block until some load has finished, at most so long."""

    def close(self) -> None:
        """Stop and join threads; loads in flight end, most of them as cancelled. Idempotent."""

    def check_integrity(self) -> None:
        """Raise RuntimeError if the source's tables disagree."""


@dataclass(slots=True)
class _Job:
    """A load in flight from a file into a slot."""

    load: Load
    location: Location | ScatteredLocation
    buffer: memoryview
    checksum: RunningChecksum | None
    """None if the expert is not to be checked."""
    arrived: bool = False
    """Whether all of it was read before it was cancelled."""

    @property
    def idle(self) -> bool:
        """Whether no thread reads into the slot or hashes its contents."""
        return not self.load.in_flight and (self.checksum is None or not self.checksum.busy)


class FileSource:
    """Reads experts from their files in threads, in pieces, most urgent first.

    Threads share one heap under one lock. Each slot is written by the pieces of one load only, and
    the owner reuses a slot only after its load has appeared in `finished`, so no two loads ever write the
    same slot. A failed read fails its load and leaves the thread alive.

    `locate` says where an expert lies; `target(layer, slot)` gives the slot's memory, at least as long as
    the expert. The first read of every expert is compared with its checksum, if it has one, while the rest
    of it is still being read. `direct` reads past the page cache where file, offset and memory allow it, for
    models that are too large for the page cache to help.
    """

    def __init__(
        self,
        locate: Callable[[ExpertKey], Location | ScatteredLocation],
        target: Callable[[int, int], memoryview],
        *,
        threads: int = 4,
        piece_bytes: int = 4 << 20,
        direct: bool = False,
    ) -> None:
        self.finished: deque[Load] = deque()
        self.patience = Patience()
        self.bytes_read = 0
        self._locate = locate
        self._target = target
        self._piece_bytes = piece_bytes
        self.direct = direct
        """Whether files that are opened from now on are read past the page cache."""
        self._heap: list[tuple[int, int, Load, FileRange]] = []  # (priority, sequence, load, what to read)
        self._sequence = itertools.count()
        self._jobs: dict[ExpertKey, _Job] = {}
        self._verified: set[ExpertKey] = set()
        self._files: dict[Path, OpenFile] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._queued = threading.Condition(self._lock)  # wakes as many threads as there are pieces: to wake
        self._ended = threading.Condition(self._lock)  # all takes longer than reading a small expert
        self._working = threads
        self._threads = [
            threading.Thread(target=self._work, name=f"moe-local-read-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def start(self, key: ExpertKey, slot: int, priority: int) -> Load:
        location = self._locate(key)
        load = Load(key, location.nbytes, priority)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"expert {key} was asked for after the source was closed")
            for path in {part.path for part in location.ranges} - self._files.keys():
                try:
                    self._files[path] = OpenFile.open(path, self.direct)
                except OSError as error:
                    gone = isinstance(error, FileNotFoundError)
                    load.error = _failure(key, path, GONE if gone else f"cannot be opened: {error.strerror}")
                    self._finish(load, LoadState.FAILED)
                    return load
            buffer, check = self._target(key.layer, slot), None
            if location.checksum is not None and key not in self._verified:
                check = RunningChecksum(buffer[: load.nbytes])
            self._jobs[key] = _Job(load, location, buffer, check)
            pieces = [piece for part in location.ranges for piece in self._cut(part)]
            load.left = len(pieces)
            for piece in pieces:
                heapq.heappush(self._heap, (priority, next(self._sequence), load, piece))
            self._queued.notify(len(pieces))
        return load

    def promote(self, load: Load, priority: int) -> None:
        with self._lock:
            if priority >= load.priority:
                return
            load.priority = priority
            if load.finished or load.cancelled:
                return
            self._heap = [(piece.priority, seq, piece, at) for _, seq, piece, at in self._heap]
            heapq.heapify(self._heap)

    def cancel(self, load: Load) -> None:
        with self._lock:
            if load.finished or load.cancelled:
                return
            load.cancelled = True
            if self._jobs[load.key].idle:
                self._finish(load, LoadState.CANCELLED)

    def poll(self) -> None:
        """Does nothing: the threads advance by themselves."""

    def wait(self, seconds: float) -> None:
        """See Source. Raises TransferError if no read has progressed for too long (Patience); reads go on."""
        with self._lock:
            if not self.finished:
                self.patience.wait(self._ended, seconds)
            reading = [job for job in self._jobs.values() if job.load.in_flight and not self.finished]
            if reading and self.patience.is_over():
                job = min(reading, key=lambda job: job.load.priority)
                raise _failure(job.load.key, job.location.ranges[0].path, SLOW.format(self.patience.seconds))

    def close(self) -> None:
        """See Source. A thread whose read does not return is left behind, with a warning.

        The memory that it reads into stays allocated until then.
        """
        with self._lock:
            self._closed = True
            for _, _, load, _ in self._heap:
                load.cancelled = True
            self._queued.notify_all()
        until = time.monotonic() + CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._threads.clear()
        with self._lock:
            for job in [job for job in self._jobs.values() if job.load.in_flight]:
                path = job.location.ranges[0].path
                logger.warning("%s", _failure(job.load.key, path, STUCK.format(CLOSING_S)))
            for _, _, load, _ in self._heap:
                if not load.finished:
                    self._finish(load, LoadState.CANCELLED)
            self._heap.clear()
            self._jobs.clear()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every unread piece of a load in flight is queued or being read."""
        with self._lock:
            queued = Counter(entry[2] for entry in self._heap)
            for load in (job.load for job in self._jobs.values()):
                unread = queued[load] + (load.in_flight if load.left else 0)
                if load.finished or (unread != load.left and not load.cancelled):
                    raise RuntimeError(
                        f"load of {load.key}, {load.state}: {load.left} pieces left, {unread} to come"
                    )

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._closed and not self._heap:
                    self._queued.wait()
                if self._closed:
                    self._working -= 1
                    if not self._working:  # the last thread closes the files
                        for file in self._files.values():
                            file.close()
                        self._files.clear()
                    return
                _, _, load, piece = heapq.heappop(self._heap)
                if load.finished or load.cancelled:
                    continue
                load.in_flight += 1
                load.state = LoadState.RUNNING
                job = self._jobs[load.key]
                file = self._files[piece.path]
            error = _read(file, job, piece)
            self._piece_done(job, piece, error)

    def _piece_done(self, job: _Job, piece: FileRange, error: TransferError | None) -> None:
        load, check = job.load, job.checksum
        with self._lock:
            load.in_flight -= 1
            load.left -= 1
            self.patience.moved()
            if error is None:
                load.moved += piece.nbytes
                self.bytes_read += piece.nbytes
            else:
                load.error = load.error or error
                load.cancelled = True  # its other pieces are useless
            job.arrived = load.left == 0 and not load.cancelled
            if check is not None and error is None:
                check.arrived(piece.at, piece.nbytes)
            part = self._next_part(job)
        while check is not None and part is not None:
            check.add(part)  # outside the lock, while other threads read
            with self._lock:
                check.added()
                part = self._next_part(job)

    def _next_part(self, job: _Job) -> memoryview | None:
        """Under the lock: the part of a load that this thread should hash, or None; may finish the load."""
        if job.checksum is not None and (job.arrived or not job.load.cancelled):
            part = job.checksum.claim()
            if part is not None:
                return part
        self._conclude(job)
        return None

    def _conclude(self, job: _Job) -> None:
        """Under the lock: finish a load if no work is left for it."""
        load, check = job.load, job.checksum
        if load.finished or not job.idle:
            return
        if load.cancelled and not job.arrived:
            self._finish(load, LoadState.FAILED if load.error else LoadState.CANCELLED)
        elif job.arrived and check is None:
            self._finish(load, LoadState.DONE)
        elif check is not None and check.complete:
            if check.digest() == job.location.checksum:
                self._verified.add(load.key)
                self._finish(load, LoadState.DONE)
                return
            (whole,) = job.location.ranges
            load.error = _failure(load.key, whole.path, f"{DAMAGED}; {job.location.remedy}")
            self._finish(load, LoadState.FAILED)

    def _cut(self, part: FileRange) -> Iterator[FileRange]:
        for start in range(0, part.nbytes, self._piece_bytes):
            nbytes = min(self._piece_bytes, part.nbytes - start)
            yield FileRange(part.path, part.offset + start, nbytes, part.at + start)

    def _finish(self, load: Load, state: LoadState) -> None:
        """Under the lock: end a load."""
        load.state = state
        self._jobs.pop(load.key, None)
        self.finished.append(load)
        self._ended.notify_all()


def _read(file: OpenFile, job: _Job, piece: FileRange) -> TransferError | None:
    """Read a piece into its place in the buffer; returns the error, if any."""
    key = job.load.key
    buffer = job.buffer[piece.at : piece.at + piece.nbytes]
    done = file.read_directly(buffer, piece.offset)
    try:
        while done < len(buffer):
            count = read_at(file.plain, buffer[done:], piece.offset + done)
            if count == 0:
                return _failure(key, piece.path, f"{CUT_OFF}; {job.location.remedy}")
            done += count
    except OSError as error:
        return _failure(key, piece.path, f"could not be read: {error.strerror}; check the disk")
    except Exception as error:  # whatever it is, the thread must survive and the error be reported
        return _failure(key, piece.path, f"could not be read: {error!r}")
    return None


def _failure(key: ExpertKey, path: Path, what: str) -> TransferError:
    return TransferError(f"expert {key.expert} of MoE layer {key.layer} in {path} {what}")
