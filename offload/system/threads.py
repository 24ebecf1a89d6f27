"""The number of threads for our kernels, and how to keep torch's threads out of their way.

After each operation, torch's threads (GNU OpenMP) spin for milliseconds before they sleep, on the cores that
our kernels need next, and meet at a barrier, where all wait for a thread that was preempted. Together, this
has been seen to double the time of a token. `moe_local` asks OpenMP not to spin, unless torch is imported
already; operations that are small enough for one thread run in one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_set = threading.local()


def kernel_threads() -> int:
    """Threads for our kernels: as many as torch is set to outside of `one_torch_thread`."""
    number: int | None = getattr(_set, "number", None)
    return torch.get_num_threads() if number is None else number


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch's operations in this thread, and in threads that it starts meanwhile, use one thread each."""
    before = kernel_threads()
    if getattr(_set, "number", None) is not None:
        yield  # the outer one restores
        return
    _set.number = before
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _set.number = None
