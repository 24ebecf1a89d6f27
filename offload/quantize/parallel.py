"""Work on parts of a matrix in threads of our own, which synchronize only once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from moe_local.offload.system.threads import kernel_threads, one_torch_thread

CHUNK = 1 << 17
"""How many weights, in whole rows, are processed at a time on the CPU, so that they fit its cache."""

DEVICE_CHUNK = 1 << 24
"""The same on other devices, where starting an operation costs more."""


def for_rows(
    matrix: torch.Tensor,
    work: Callable[[slice], None],
    together: int = 1,
    *,
    chunk: int = CHUNK,
    device_chunk: int = DEVICE_CHUNK,
) -> None:
    """Call `work` for all rows of `matrix`, some at a time, cut only at multiples of `together` rows."""
    rows, columns = matrix.shape
    on_cpu = matrix.device.type == "cpu"
    step = max(1, (chunk if on_cpu else device_chunk) // max(1, columns * together)) * together
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if on_cpu:
        for_each(parts, work)
    else:
        for part in parts:
            work(part)


def for_each(parts: Sequence[slice], work: Callable[[slice], None]) -> None:
    """Call `work` with every part, in as many threads as torch is set to; raises the error of any call.

    Torch's own operations in them are single-threaded.
    """
    threads = max(1, min(kernel_threads(), len(parts)))
    inference = torch.is_inference_mode_enabled()

    def some(first: int) -> None:
        # all three are per thread
        with torch.inference_mode(inference), torch.no_grad(), one_torch_thread():
            for part in parts[first::threads]:
                work(part)

    if threads == 1:
        some(0)
    else:
        with ThreadPoolExecutor(threads, "parts") as pool:
            list(pool.map(some, range(threads)))
