"""How much memory can be had on this machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

GIB = 2**30


def free_ram(*, reserve: bool = True) -> int:
    """Bytes of RAM that can be had here, within a container's limit; less a reserve of a sixteenth of the
    machine's, 1 GiB at least, but never more than half of what is free."""
    memory = psutil.virtual_memory()
    free = int(memory.available)
    limit = _container_free()
    if limit is not None:
        free = min(free, limit)
    return max(free // 2, free - max(GIB, int(memory.total) // 16)) if reserve else free


def free_vram(device: torch.device, *, reserve: bool = True) -> int:
    """Bytes of a CUDA device's memory that can be had; less a reserve of a 32nd of it, 256 MiB at least."""
    free, total = torch.cuda.mem_get_info(device)
    return max(free // 2, free - max(GIB // 4, total // 32)) if reserve else free


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the memory limit of this control group (version 2) leaves; None without a limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        cached = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(cached.get("inactive_file", 0)))
