"""The compute device as the expert tiers see it: an arena, copies with events, and nothing else.

All CUDA calls of the memory side live here, behind a protocol, so that the code that decides what moves
when runs in tests on a fake device whose copies finish in adversarial order.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import sys
import time
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from moe_local.cache.errors import DoesNotFitError
from moe_local.cache.keys import format_bytes
from moe_local.offload.gpu.capturing import alone
from moe_local.offload.quantize.layout import PAGE
from moe_local.offload.system.pages import page_mapping

logger = logging.getLogger(__name__)

PIECE = 2 << 20
LARGE = 10 << 20
"""torch's CUDA allocator asks the driver for whole PIECEs when a tensor has LARGE bytes or more."""

PORTABLE, MAPPED = 1, 2
"""Flags of cudaHostRegister: pinned for copies to every card, not only the current one, and readable by
kernels. Where host and device share one address space, both are implied if no flag is given; with only one of
them, we do not rely on it."""

WINDOWS_REMEDY = (
    "set a smaller --vram, since Windows counts what is pinned as the card's, too, in WSL raise memory= in "
    ".wslconfig,"
)
"""On an RTX 3090 under WDDM tensors and pinned RAM together came to little more than the card's 24 GiB,
whatever the split (ashalliants/ninfer-3090, pull request 45)."""

TRIAL = 32 << 20
"""Bytes of a copy whose bandwidth is measured."""


class Event(Protocol):
    """A point in a stream of work, as torch.cuda.Event."""

    def query(self) -> bool:
        """Whether everything before the point has happened. Does not block."""

    def synchronize(self) -> None:
        """Block the host until everything before the point has happened."""


class Waited(Protocol):
    """A wait of the compute stream, timed by the device."""

    def seconds(self) -> float:
        """How long the stream stood still; blocks the host until that is known."""


class Copied(Event, Protocol):
    """The end of a copy."""

    def seconds(self) -> float:
        """How long the copy ran, without its wait for other work. Only valid once it has happened."""


class Idle(Protocol):
    """A moment from which on the compute stream has nothing new to do."""

    def end(self) -> Waited:
        """Call when the stream gets work again; returns the wait that says how long it had none."""


class Device(Protocol):
    """A device with memory of its own, one compute stream and one copy stream."""

    torch_device: torch.device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] in device memory, uninitialized. Raises DoesNotFitError.

        Earlier uses of these bytes have ended by the time that any copy or work of the compute stream begins.
        """

    def trim(self) -> None:
        """Return memory that this process caches but does not use to the driver, for other programs."""

    def taken_by_others(self) -> int | None:
        """Bytes of the device that are neither free nor this process's tensors; None if unknown."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None) -> Copied:
        """Copy host bytes to the device on the copy stream, once `after` has happened.

        Returns at once. Both buffers must stay untouched until the returned event has happened.
        """

    def move(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes within the device on the compute stream. Returns at once."""

    def record(self) -> Event:
        """An event behind all work that the compute stream has been given so far."""

    def wait(self, event: Event) -> Waited:
        """Make later work of the compute stream wait for the event. Does not block the host."""

    def idle(self) -> Idle:
        """Start timing how long the compute stream has no work: the host gives it no more for now."""


class CudaDevice:
    """One NVIDIA (or ROCm) card. Copies run on a stream of their own beside the compute stream."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        # torch hands out 32 streams per priority in turn. One of the default priority might be the stream on
        # which another model's graph is being captured. Copies run the same at any priority.
        self._copy_stream = torch.cuda.Stream(torch_device, priority=-1)

    def allocate(self, nbytes: int) -> torch.Tensor:
        # A large allocation gets whole pieces from the driver. Asked for, the rest of the last one is part of
        # it, where torch would put other tensors there, which keep the driver from having any of it back.
        whole = nbytes if nbytes < LARGE else -(-nbytes // PIECE) * PIECE
        try:
            memory = torch.empty(whole, dtype=torch.uint8, device=self.torch_device)[:nbytes]
        except torch.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            raise DoesNotFitError(
                f"{self.torch_device} refused {format_bytes(nbytes)} for expert slots, "
                f"{format_bytes(free)} are free; close other programs on the card or set a smaller --vram"
            ) from error
        # torch reuses memory in the order of its stream: kernels that used it before may still be running.
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        return memory

    def trim(self) -> None:
        with alone, torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()

    def taken_by_others(self) -> int | None:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return max(0, total - free - torch.cuda.memory_reserved(self.torch_device))

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None) -> Copied:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._copy_stream):
            if after is not None:
                self._copy_stream.wait_event(cast(torch.cuda.Event, after))
            begin.record(self._copy_stream)
            self._transfer(destination, source)
            end.record(self._copy_stream)
        return CudaCopy(begin, end)

    def _transfer(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """The copy itself, on the current stream."""
        destination.copy_(source, non_blocking=True)

    def move(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def wait(self, event: Event) -> Waited:
        idle = self.idle()
        end = event.end if isinstance(event, CudaCopy) else cast(torch.cuda.Event, event)
        torch.cuda.current_stream(self.torch_device).wait_event(end)
        return idle.end()

    def idle(self) -> CudaIdle:
        return CudaIdle(torch.cuda.current_stream(self.torch_device))


class CudaCopy:
    """A copy between two timing events of the copy stream."""

    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._begin = begin
        self.end = end

    def query(self) -> bool:
        return bool(self.end.query())

    def synchronize(self) -> None:
        self.end.synchronize()

    def seconds(self) -> float:
        return float(self._begin.elapsed_time(self.end)) / 1000


class CudaIdle:
    """A timing event of the compute stream, and later another one."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._before = torch.cuda.Event(enable_timing=True)
        self._before.record(stream)

    def end(self) -> CudaWait:
        after = torch.cuda.Event(enable_timing=True)
        after.record(self._stream)
        return CudaWait(self._before, after)


class CudaWait:
    """A wait between two timing events of the compute stream."""

    def __init__(self, before: torch.cuda.Event, after: torch.cuda.Event) -> None:
        self._before = before
        self._after = after

    def seconds(self) -> float:
        self._after.synchronize()
        return float(self._before.elapsed_time(self._after)) / 1000


class HostMemory:
    """Page-aligned host memory of an exact size, which can be pinned for copies to a CUDA device.

    torch's pinned allocator rounds every block up to a power of two (a 20.4 GiB request pins 32 GiB), so
    the memory is an anonymous mapping registered with CUDA range by range.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(PAGE, -(-nbytes // PAGE) * PAGE)
        self.pinned_bytes = 0
        self._registered: list[int] = []
        try:
            self._mapping: mmap.mmap | None = page_mapping(self.nbytes)
        except OSError as error:
            raise DoesNotFitError(
                f"the system refused {format_bytes(nbytes)} of memory for expert slots; set a smaller --ram"
            ) from error
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)

    @property
    def registered(self) -> tuple[int, ...]:
        """Addresses at which the pinned ranges start."""
        return tuple(self._registered)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes [offset, offset + nbytes) for `os.preadv` and the like; valid until `close`."""
        return self.tensor.numpy().data[offset : offset + nbytes]

    def pin(self, cuts: Sequence[int]) -> None:
        """Pin [cuts[0], cuts[1]), [cuts[1], cuts[2]) and so on; cuts are multiples of the page size.

        A copy must not cross a cut. If the system refuses (WSL, low locked-memory limits), the rest stays
        pageable: correct, but copies from it are slower and block the host; a warning says so once, with
        their cost. The last pinned range is then unpinned again, since the small allocations that are pinned
        for every token would be refused, too, and for those that is an error.
        """
        self._keep_from_children()
        base, ends = self.tensor.data_ptr(), [cuts[0]]
        for start, end in itertools.pairwise(cuts):
            if int(torch.cuda.cudart().cudaHostRegister(base + start, end - start, PORTABLE | MAPPED)) != 0:
                _forget_cuda_error()
                if self._registered:
                    torch.cuda.cudart().cudaHostUnregister(self._registered.pop())
                    ends.pop()
                self.pinned_bytes = ends[-1] - cuts[0]
                self._tell_refusal(cuts[0], ends[-1], cuts[-1])
                return
            self._registered.append(base + start)
            ends.append(end)
            self.pinned_bytes = end - cuts[0]

    def _keep_from_children(self) -> None:
        """Do not share the memory with forked processes.

        After a fork, whichever process writes to a page first gets a copy of it. If that is this one, the
        device would go on reading the old page, on Linux kernels that ignore pins (before 5.9, and WSL's);
        newer ones copy all pinned memory during the fork.
        """
        if self._mapping is not None and hasattr(mmap, "MADV_DONTFORK"):
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_DONTFORK)

    def _tell_refusal(self, start: int, pinned: int, end: int) -> None:
        """Bytes [start, pinned) are pinned, [pinned, end) are not."""
        cost = "about half as fast"
        rates = [copy_rate(self.tensor[a:b]) for a, b in ((start, pinned), (pinned, end))]
        if rates[0] and rates[1]:
            cost = f"{rates[1] / 1e9:.3g} instead of {rates[0] / 1e9:.3g} GB/s"
        logger.warning(
            "the system pinned %s of %s for experts in RAM%s; copies of the other %.0f %% are %s and hold "
            "the host up: %s or set a smaller --ram",
            format_bytes(self.pinned_bytes),
            format_bytes(end - start),
            "" if _is_windows() else " (VRAM is not what lacks)",
            100 * (end - pinned) / (end - start),
            cost,
            WINDOWS_REMEDY if _is_windows() else "raise the locked-memory limit (ulimit -l)",
        )

    def close(self) -> None:
        """Unpin and release the memory; the system gets it back once the last view is gone. Idempotent."""
        for pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._registered.clear()
        self.tensor, self._mapping = torch.empty(0, dtype=torch.uint8), None


def _is_windows() -> bool:
    """Whether Windows manages the card's memory (WDDM): on Windows and in WSL."""
    from moe_local.offload.doctor.host import is_wsl

    return sys.platform == "win32" or is_wsl()


def copy_rate(memory: torch.Tensor) -> float | None:
    """Bytes per second of copying (a part of) host memory to the current CUDA device; None if that fails.

    Overwrites that part with zeros first, since pages that were never written are not representative.
    """
    source = memory[:TRIAL]
    if not torch.cuda.is_available() or not source.numel():
        return None
    try:
        target = torch.empty_like(source, device="cuda")
        target.copy_(source.zero_())
        torch.cuda.current_stream().synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.current_stream().synchronize()
    except RuntimeError:  # torch raises these for all device errors, out of memory included
        return None
    return source.numel() / (time.perf_counter() - start)


def _forget_cuda_error() -> None:
    """Clear the error of a refused registration, which the next kernel launch would raise otherwise."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
