"""The machine that a measurement was made on, and how much of its memory was used."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from typing import Any

import psutil
import torch

from moe_local.offload.native.library import library
from moe_local.offload.plan import bandwidth


def describe(device: torch.device) -> dict[str, Any]:
    """Plain JSON types: hardware, system and versions."""
    import transformers

    import moe_local

    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {
        "id": bandwidth.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "device": str(device),
        "cpu_kernels": library() is not None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moe_local": moe_local.__version__,
    }


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most memory that this process has used so far; `vram` is torch's allocations, including arenas."""
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"vram": vram, "ram": _peak_ram()}


def _peak_ram() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux


def storage_bytes() -> int | None:
    """Bytes that this process has read from storage, without page cache hits; None if unknown."""
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        return int(psutil.Process().io_counters().read_bytes)
    return None


def drop_page_cache(paths: Any) -> None:
    """Ask the system to drop these files from the page cache, which it need not do."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
