"""How much memory is available on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from moe_local.cache.errors import MoeLocalError, first_line
from moe_local.offload.gpu.capturing import alone

if TYPE_CHECKING:
    import torch

GIB = 2**30


class Limit(NamedTuple):
    """A bound on the memory of a control group that this process is in."""

    limit: int
    free: int
    """Bytes left of the limit: those not used, and those used by file pages that the system can reclaim."""


def free_ram(*, reserve: bool = True) -> int:
    """Bytes of RAM that are available, within the limit of every control group (a container's, a service's).

    A reserve is subtracted: a sixteenth of the machine's RAM, at least 1 GiB; for a group, a sixteenth of its
    limit, at least 128 MiB, since a container has no other programs to leave memory for. The reserve is never
    more than half of what is free.
    """
    memory = psutil.virtual_memory()
    found = [(int(memory.available), max(GIB, int(memory.total) // 16))]
    found += [(group.free, max(GIB // 8, group.limit // 16)) for group in group_limits()]
    return min(max(free // 2, free - least) if reserve else free for free, least in found)


def free_vram(device: torch.device, *, reserve: bool = True) -> int:
    """Bytes of a CUDA device's memory that are available, less a reserve of a 32nd of it, at least 256 MiB,
    but never more than half of what is free.

    Memory that torch keeps for later, such as that of a model that was closed, is given back first. Raises
    MoeLocalError if the device is not available at all, for example in exclusive use by a process.
    """
    import torch  # takes seconds, and is not needed for RAM

    try:
        with alone:
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        raise MoeLocalError(
            f"{device} cannot be used: {first_line(error)}; end what else uses it, ask moe-local doctor, or "
            "use device='cpu'"
        ) from error
    return max(free // 2, free - max(GIB // 4, total // 32)) if reserve else free


def group_limits(
    mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[Limit]:
    """The memory limits of this process's control groups, its own and those around it; version 1 or 2.

    `own` says which groups these are; empty where there are none, as on other systems than Linux.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            for root in (mounted, mounted / "unified"):
                limits += [found for folder in _around(root, path) if (found := _version_2(folder))]
        elif "memory" in controllers.split(","):
            limits += [found for folder in _around(mounted / "memory", path) if (found := _version_1(folder))]
    return limits


def _around(root: Path, path: str) -> Iterator[Path]:
    """A group's folder and those of its parent groups, including `root`.

    In a container, `root` may be the container's own group, and the path one that does not exist below it, or
    that leads out of it.
    """
    parts = [part for part in path.split("/") if part]
    for count in range(0 if ".." in parts else len(parts), -1, -1):
        yield root.joinpath(*parts[:count])


def _version_2(folder: Path) -> Limit | None:
    try:
        bounds = [(folder / name).read_text().strip() for name in ("memory.max", "memory.high")]
        used = int((folder / "memory.current").read_text())
        idle = _statistic(folder, "inactive_file")
    except (OSError, ValueError):  # the root has no such files
        return None
    limit = min((int(bound) for bound in bounds if bound != "max"), default=None)
    return None if limit is None else Limit(limit, max(0, limit - used + idle))


def _version_1(folder: Path) -> Limit | None:
    try:
        limit = int((folder / "memory.limit_in_bytes").read_text())
        used = int((folder / "memory.usage_in_bytes").read_text())
        idle = _statistic(folder, "total_inactive_file")
    except (OSError, ValueError):
        return None
    return None if limit >= 1 << 60 else Limit(limit, max(0, limit - used + idle))


def _statistic(folder: Path, name: str) -> int:
    """A figure of memory.stat; 0 if it is not there."""
    lines = (folder / "memory.stat").read_text().splitlines()
    return int(dict(line.split() for line in lines).get(name, 0))
