"""CUDA graphs as the decode loop needs them, behind a protocol: what a device is given, given again at once.

A step launches some 60 operations a layer, each of which costs the host microseconds; replayed as a graph
they cost it one call. All CUDA calls of graphs live here; tests have a device of their own that records what
torch is asked for and, like CUDA, does nothing of it before it is replayed.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Protocol

import torch

from moe_local.offload.gpu.capturing import alone


class Graph(Protocol):
    """What was captured between `begin` and `end`: reads and writes the same memory at every replay."""

    def replay(self) -> None:
        """Do it all, on the device's current stream, behind what that was given before. Does not block."""


class Graphs(Protocol):
    """Captures graphs. One capture at a time, by one thread.

    Nothing that is captured happens before the graph is replayed. What is allocated during a capture comes
    from a pool that all graphs share: memory that Python has let go of is used again by later captures, so
    graphs must not run at the same time, and what one leaves for something else must be held until that is
    captured, or for as long as it is replayed.
    """

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Around all captures that belong together, with what runs between them."""

    def begin(self, device: torch.device | None = None) -> None:
        """Capture from here on what `device` is given, where there are several; None: the last one, and the
        first one when a session begins. What it cannot capture, a wait of the host above all, raises.

        A lack of the device's memory raises torch.OutOfMemoryError, here, until the capture ends, in `end`
        and at a graph's first replay.
        """

    def end(self) -> Graph:
        """The capture is complete. Raises if it was spoiled meanwhile."""

    def abort(self) -> None:
        """Throw a capture away, if one has begun. Raises nothing."""

    def make_room(self) -> None:
        """Give memory that is kept for later use back to the driver, which a capture cannot have done."""


_SPOILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose end torch has not noticed. There are few, and they hold no memory."""


class CudaGraph:
    """A graph of torch's, replayed while nobody captures another."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph = graph
        self._device = device

    def replay(self) -> None:
        try:
            with alone:
                self._graph.replay()
        except RuntimeError as error:
            _raise_lack(error, self._device)
            raise


def _raise_lack(error: BaseException, device: torch.device) -> None:
    """Raise torch's error for a lack of the device's memory if `error` is CUDA's own, which names no card.

    Which is only known here: elsewhere CUDA says so of RAM that it was to pin, too.
    """
    if not isinstance(error, torch.OutOfMemoryError) and "out of memory" in str(error):
        raise torch.OutOfMemoryError(f"GPU {device.index}: {error}") from error


class CudaGraphs:
    """Graphs of one CUDA device. Sessions run on a stream of their own: the default one cannot be captured.

    Calls that a capture forbids (allocating, waiting for events) are forbidden to this thread only, so other
    models may go on in other threads. Their sessions wait for one another (`alone`), or each would find what
    the other does on the stream in its graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _session_stream(device)
        self._number = torch.zeros(1, device=device)
        """Something to write to in `_recover`, without asking for memory."""
        self._capturing: torch.cuda.CUDAGraph | None = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        with alone:
            outer = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(outer)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                outer.wait_stream(self._stream)

    def begin(self, device: torch.device | None = None) -> None:
        torch.cuda.set_device(self._device)  # else, on several cards, another's: the session sets it back
        torch.cuda.current_blas_handle()  # this thread's handle and workspace, which a capture can't make
        # torch 2.11 puts two numbers of its generator into VRAM, and ends the process where it finds no room.
        room = [torch.empty_like(self._number, dtype=torch.long) for _ in range(2)]
        del room
        if not self._alive:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except BaseException as error:
            self._recover(graph)
            _raise_lack(error, self._device)
            raise
        self._capturing = graph

    def end(self) -> Graph:
        graph, self._capturing = self._capturing, None
        assert graph is not None, "no capture has begun"
        try:
            graph.capture_end()
        except BaseException as error:
            self._recover(graph)
            _raise_lack(error, self._device)
            raise
        self._alive.add(graph)
        return CudaGraph(graph, self._device)

    def abort(self) -> None:
        graph, self._capturing = self._capturing, None
        if graph is None:
            return
        try:
            graph.capture_end()
        except RuntimeError:  # a spoiled capture says so again when it is ended
            self._recover(graph)

    def make_room(self) -> None:
        with alone, torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def _recover(self, spoiled: torch.cuda.CUDAGraph) -> None:
        """Do what torch leaves undone where a spoiled capture has ended; within the session.

        Its allocator would take the capture for still under way, in which it frees nothing and refuses to
        empty its cache; and some releases would leave the random generator in the capture's mode, which a
        good capture takes it out of. That of pinned memory cannot be told from here: it goes on asking the
        graph whose captures it serves, which has to stay.
        """
        with contextlib.suppress(RuntimeError):  # what follows only if there was something for the first
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
            _SPOILED.append(spoiled)
            torch._C._cuda_releasePool(self._stream.device_index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        self._alive.clear()
        with contextlib.suppress(RuntimeError):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            try:
                self._number.zero_()
            finally:
                graph.capture_end()


@functools.cache
def _session_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: torch keeps a workspace for every stream that matrices were ever multiplied on."""
    return torch.cuda.Stream(device)
