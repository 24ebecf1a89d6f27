"""Work on parts of a matrix in threads of our own.

torch's threads meet after every operation, and where cores are shared each time wait for the one that was
interrupted: thirty times the time of one thread has been seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def for_each(parts: Sequence[slice], work: Callable[[slice], None]) -> None:
    """Call `work` with every part, in as many threads as torch is set to; an error of one is raised.

    torch's operations run without threads of their own meanwhile, in the whole process.
    """
    threads = min(torch.get_num_threads(), len(parts))
    inference = torch.is_inference_mode_enabled()

    def some(first: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # which each thread has for itself
            for part in parts[first::threads]:
                work(part)

    with _one_torch_thread():
        if threads <= 1:
            some(0)
        else:
            with ThreadPoolExecutor(threads, "parts") as pool:
                list(pool.map(some, range(threads)))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
