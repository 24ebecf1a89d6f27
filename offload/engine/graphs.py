"""CUDA graphs as the decode loop needs them, behind a protocol.

A step launches some 60 operations a layer, each of which costs the host microseconds; replaying them as a
graph costs one call. All CUDA calls for graphs are in this module. Tests use a fake device that records the
operations that torch requests and, like CUDA, executes them only in a replay.
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
    """The work that was captured between `begin` and `end`. Every replay reads and writes the same memory."""

    def replay(self) -> None:
        """Enqueue all of the work on the device's current stream. Does not block."""


class Graphs(Protocol):
    """Captures graphs. One capture at a time, by one thread.

    Captured work is executed only when the graph is replayed. Memory allocated during a capture comes from a
    pool that all graphs share. Later captures reuse memory whose tensors Python has released, so graphs must
    not run concurrently, and a tensor that a graph leaves for other work must be held until that work is
    captured, or, if it is not captured, for as long as the graph is replayed.
    """

    def session(self) -> contextlib.AbstractContextManager[None]:
        """A context around captures that belong together and the work between them."""

    def begin(self, device: torch.device | None = None) -> None:
        """Start to capture the work of `device`. None: the device of the last capture, and at the beginning
        of a session the first device. Operations that cannot be captured, above all host syncs, raise.

        A lack of device memory raises torch.OutOfMemoryError: here, during the capture, in `end`, or at a
        graph's first replay.
        """

    def end(self) -> Graph:
        """Complete the capture. Raises if it was invalidated."""

    def abort(self) -> None:
        """Discard the current capture, if there is one. Raises nothing."""

    def make_room(self) -> None:
        """Return cached memory to the driver, which is not possible during a capture."""


_SPOILED: list[torch.cuda.CUDAGraph] = []
"""Graphs of invalidated captures, which some part of torch still refers to: see `_recover`. They are few, and
hold no memory."""


class CudaGraph:
    """A torch.cuda.CUDAGraph whose replays exclude captures in other threads."""

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
    """Raise torch.OutOfMemoryError, which names the GPU, if `error` is CUDA's own out-of-memory error.

    Only here is it certain to mean device memory: CUDA reports failures to pin RAM in the same words.
    """
    if not isinstance(error, torch.OutOfMemoryError) and "out of memory" in str(error):
        raise torch.OutOfMemoryError(f"GPU {device.index}: {error}") from error


class CudaGraphs:
    """Graphs of one CUDA device. Sessions run on their own stream: the default stream cannot be captured.

    Calls that are illegal during a capture (allocating, waiting for events) are illegal in this thread only,
    so other models may run in other threads. Sessions exclude one another (`alone`), since they share a
    stream: otherwise each would capture the other's work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _session_stream(device)
        self._number = torch.zeros(1, device=device)
        """A target for the write in `_recover`, allocated beforehand."""
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
        torch.cuda.set_device(self._device)  # another card may be current; the session restores it
        torch.cuda.current_blas_handle()  # create this thread's handle and workspace, impossible in a capture
        # torch 2.11 allocates two numbers of its generator in VRAM, and aborts the process if that fails.
        room = [torch.empty_like(self._number, dtype=torch.long) for _ in range(2)]
        del room
        if not self._alive:  # a pool is destroyed with its last graph
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
        except RuntimeError:  # ending an invalidated capture raises again
            self._recover(graph)

    def make_room(self) -> None:
        with alone, torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def _recover(self, spoiled: torch.cuda.CUDAGraph) -> None:
        """Clean up what torch does not after an invalidated capture. Call within the session.

        Otherwise torch's allocator assumes that the capture is still running: it frees nothing and refuses to
        empty its cache. Some releases also leave the random generator in capture mode, which the end of a
        successful capture resets. The allocator of pinned memory cannot be reset from here: it goes on
        querying the invalidated graph, which therefore must stay alive (`_SPOILED`).
        """
        with contextlib.suppress(RuntimeError):  # if the first call fails, the others are not needed
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
    """One stream per device: torch keeps a workspace for every stream on which it has multiplied matrices."""
    return torch.cuda.Stream(device)
