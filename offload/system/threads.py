"""How many threads our kernels take, and torch's own kept out of their way.

torch's threads (GNU OpenMP) spin for milliseconds after each operation before they sleep, on the cores that
our kernels need next, and meet after every operation, each waiting for the one that was interrupted. Together
that has been seen to double the time of a token. `moe_local` asks OpenMP not to spin where torch is not
imported yet; what is small enough for one thread runs in one.
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
    """torch's operations in this thread, and in threads that it starts meanwhile, take one thread each."""
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
