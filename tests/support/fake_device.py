"""A fake device whose copies and events complete as late, and in as adverse an order, as CUDA allows."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from moe_local.cache.errors import DoesNotFitError

POISON = 0xA5
"""Byte that fills a slot before its first copy, and while a copy into it is running."""


class _Work:
    """One step in a stream, which runs only after the stream's previous step and after the event `needs`."""

    def __init__(self, stream: _Stream, run: Callable[[], object], needs: FakeEvent | None = None) -> None:
        self.stream = stream
        self.run = run
        self.needs = needs
        self.done = False

    def force(self) -> None:
        """Run the stream up to and including this step."""
        while not self.done:
            # A test's time-out may have interrupted the step as it ran, and this must not loop forever.
            assert self.stream.advance(force=True), "a step that its stream has lost"


def _nothing() -> None:
    """Replaces the work of a step that has run."""


class _Stream:
    """A queue of work that runs in the order of issue, like a CUDA stream."""

    def __init__(self) -> None:
        self.queue: list[_Work] = []
        self.issued = 0

    def add(self, run: Callable[[], object], needs: FakeEvent | None = None) -> _Work:
        self.issued += 1
        self.queue.append(_Work(self, run, needs))
        return self.queue[-1]

    def advance(self, *, force: bool = False) -> bool:
        """Run the next step if its event has happened; with `force`, make the event happen first. Returns
        whether a step ran."""
        if not self.queue:
            return False
        work = self.queue[0]
        if work.needs is not None and not work.needs.happened:
            if not force:
                return False
            work.needs.work.force()
        self.queue.pop(0)
        work.run()
        work.done, work.run, work.needs = True, _nothing, None  # so that events keep no tensors alive
        return True


class FakeEvent:
    """Happens when a step is complete. `query` may let a little time pass."""

    def __init__(self, device: FakeDevice, work: _Work) -> None:
        self.device = device
        self.work = work
        self.position = work.stream.issued
        """How many steps of its stream it covers, its own included."""

    @property
    def happened(self) -> bool:
        return self.work.done

    def query(self) -> bool:
        self.device.pass_time()
        return self.happened

    def synchronize(self) -> None:
        self.work.force()

    def seconds(self) -> float:
        """The duration of the copy: always a tenth of a millisecond."""
        assert self.happened, "a copy was asked for its time before its end"
        return 1e-4


class FakeIdle:
    """A period in which the compute stream gets no work. It counts a millisecond of idle time if the stream
    had completed all earlier work by its end."""

    def __init__(self, device: FakeDevice, stream: _Stream) -> None:
        self._device = device
        self._stream = stream
        self._work = stream.add(lambda: None)

    def end(self) -> FakeWait:
        self._device.pass_time()
        return FakeWait(self._stream.add(lambda: None), self._work.done)


class FakeWait:
    """A wait of the compute stream: it took a millisecond if `blocked`, else no time."""

    def __init__(self, work: _Work, blocked: bool) -> None:
        self._work = work
        self._blocked = blocked

    def seconds(self) -> float:
        self._work.force()
        return 0.001 if self._blocked else 0.0


class _Read(NamedTuple):
    """Addresses [start, end) that a kernel was given: step number `position` of the compute stream."""

    start: int
    end: int
    position: int


class FakeDevice:
    """The Device protocol over host memory: one compute and one copy stream, which advance at random.

    Each stream keeps its order; between the two, every order occurs that events do not forbid. A copy poisons
    its destination when it begins and reads its source only when it ends, so reading a slot too early and
    reusing a source too early both show as wrong bytes.

    Kernels are either torch's own, which read at once, so that `wait` makes its event happen immediately; or,
    with `lazy`, functions given to `launch`, which run as late as possible. A copy into memory that kernels
    were given raises AssertionError unless the event `after` covers all of them. So do a copy into another
    device's memory, a kernel that is given such memory, and a wait for another device's copy. These errors
    are also recorded in `faults`, in case the exception is swallowed. `fail_copies`, `fail_moves` and
    `fail_records` are how many of the next such calls raise.
    """

    torch_device = torch.device("cpu")

    def __init__(
        self, seed: int = 0, luck: float = 0.3, *, lazy: bool = False, capacity: int | None = None
    ) -> None:
        """`luck`: the chance of each further step when time passes. `capacity`: the most bytes that may be
        allocated at a time; None: no limit."""
        self.capacity = capacity
        self.allocated = 0
        """Bytes of allocations that are still referenced."""
        self.trims = 0
        self.copies = 0
        self.fail_copies = self.fail_moves = self.fail_records = 0
        self.faults: list[str] = []
        self._lazy = lazy
        self._luck = luck
        self._random = random.Random(seed)
        self._compute = _Stream()
        self._copy = _Stream()
        self._reads: list[_Read] = []
        self._own: list[tuple[int, int]] = []
        """Begin and end of each part of the device's memory: referenced allocations and adopted memory."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        if self.capacity is not None and self.allocated + nbytes > self.capacity:
            raise DoesNotFitError(f"the fake device refused {nbytes} bytes for expert slots")
        memory = np.full(nbytes, POISON, dtype=np.uint8)
        self.allocated += nbytes
        tensor = torch.from_numpy(memory)
        weakref.finalize(memory, self._freed, self.adopt(tensor))  # called when its last view is freed
        return tensor

    def adopt(self, memory: torch.Tensor) -> tuple[int, int]:
        """Make `memory` part of this device's memory; returns its begin and end."""
        self._own.append((memory.data_ptr(), memory.data_ptr() + memory.numel()))
        return self._own[-1]

    def _freed(self, place: tuple[int, int]) -> None:
        self.allocated -= place[1] - place[0]
        self._own.remove(place)

    def trim(self) -> None:
        self.trims += 1

    def taken_by_others(self) -> int | None:
        return None

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: FakeEvent | None) -> FakeEvent:
        self._may_fail("fail_copies")
        self._check_own(destination)
        self._check_readers(destination, after)
        self.copies += 1
        self._copy.add(lambda: destination.fill_(POISON), after)
        event = FakeEvent(self, self._copy.add(lambda: destination.copy_(source)))
        self.pass_time()
        return event

    def move(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._may_fail("fail_moves")
        self._check_own(destination)
        self.launch(source, destination.copy_)
        start = destination.data_ptr()
        self._reads.append(_Read(start, start + destination.numel(), self._compute.issued))

    def record(self) -> FakeEvent:
        self._may_fail("fail_records")
        event = FakeEvent(self, self._compute.add(lambda: None))
        self.pass_time()
        return event

    def wait(self, event: FakeEvent) -> FakeWait:
        if event.device is not self:
            self._fail("a device was made to wait for another one's copy")
        blocked = not event.happened
        work = self._compute.add(lambda: None, event)
        if not self._lazy:
            work.force()
        return FakeWait(work, blocked)

    def idle(self) -> FakeIdle:
        return FakeIdle(self, self._compute)

    def launch(self, buffer: torch.Tensor, kernel: Callable[[torch.Tensor], None]) -> None:
        """Launch a kernel, which reads `buffer` when the compute stream gets to it."""
        self._check_own(buffer)
        start = buffer.data_ptr()
        work = self._compute.add(lambda: kernel(buffer))
        self._reads.append(_Read(start, start + buffer.numel(), self._compute.issued))
        if not self._lazy:
            work.force()

    @property
    def copying(self) -> bool:
        """Whether a copy is in flight."""
        return bool(self._copy.queue)

    def synchronize(self) -> None:
        """Complete all issued work."""
        for stream in (self._compute, self._copy):
            while stream.advance(force=True):
                pass

    def pass_time(self) -> None:
        """Let the streams advance by a random number of steps, perhaps none."""
        while self._random.random() < self._luck:
            self._random.choice((self._compute, self._copy)).advance()

    def _may_fail(self, what: str) -> None:
        if left := getattr(self, what):
            setattr(self, what, left - 1)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _fail(self, what: str) -> NoReturn:
        self.faults.append(what)
        raise AssertionError(what)

    def _check_own(self, buffer: torch.Tensor) -> None:
        start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
        if not any(first <= start and end <= last for first, last in self._own):
            self._fail("memory of another device was given to this one")

    def _check_readers(self, destination: torch.Tensor, after: FakeEvent | None) -> None:
        start, end = destination.data_ptr(), destination.data_ptr() + destination.numel()
        over = [read for read in self._reads if read.start < end and start < read.end]
        if over and (
            after is None
            or after.work.stream is not self._compute
            or after.position < max(read.position for read in over)
        ):
            self._fail(f"a copy into a slot did not wait for its {len(over)} kernels")
        self._reads = [read for read in self._reads if read not in over]
