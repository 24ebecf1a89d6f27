"""The number of threads for our kernels, and how to keep torch's threads out of their way.

After each operation, torch's threads (GNU OpenMP) spin for milliseconds before they sleep, on the cores that
our kernels need next, and meet at a barrier, where all wait for a thread that was preempted. Together, this
has been seen to double the time of a token. `moe_local` asks OpenMP not to spin, unless torch is imported
already; operations that are small enough for one thread run in one.

torch.set_num_threads will not do for that: it also sets the number with which every later thread begins. So
the libraries below torch are asked, which keep a number for each thread.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_set = threading.local()

Setter = Callable[[int], int]
"""Sets the number of threads for the calling thread."""


def kernel_threads() -> int:
    """Threads for our kernels: as many as torch is set to outside of `one_torch_thread`."""
    number: int | None = getattr(_set, "number", None)
    return torch.get_num_threads() if number is None else number


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch's operations in this thread, and in no other, use one thread each.

    Where torch's OpenMP cannot be reached, they keep theirs.
    """
    if getattr(_set, "number", None) is not None:
        yield  # the outer one restores
        return
    # Asked for its number, torch sets up a thread that it has not seen, which would undo ours later.
    number = _set.number = torch.get_num_threads()
    set_openmp, set_mkl = _setters()
    set_openmp(1)
    before = set_mkl(1)
    try:
        yield
    finally:
        set_mkl(before)
        set_openmp(number)
        _set.number = None


@functools.cache
def _setters() -> tuple[Setter, Setter]:
    """Those of torch's OpenMP, and of its MKL, which returns the number before, 0 for none.

    Both do nothing where torch's OpenMP is not found.
    """
    for path in (torch._C.__file__, Path(torch.__file__).parent / "lib" / "libiomp5md.dll"):
        try:
            library = ctypes.PyDLL(str(path))  # with all that it links; so short calls keep Python's lock
            set_openmp = library.omp_set_num_threads
        except (OSError, AttributeError):
            continue
        number = torch.get_num_threads()
        other = 2 if number == 1 else 1
        set_openmp(other)
        seen = torch.get_num_threads()
        set_openmp(number)
        if seen == other:
            # MKL follows OpenMP until somebody calls torch.set_num_threads, and where it is not found.
            return set_openmp, getattr(library, "MKL_Set_Num_Threads_Local", _set_nothing)
    return _set_nothing, _set_nothing


def _set_nothing(number: int) -> int:
    return 0
