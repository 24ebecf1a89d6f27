"""Checks of the processor, of memory and its limits, and of disks."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from moe_local.cache.keys import format_bytes
from moe_local.offload.doctor.finding import Finding, fail, warn
from moe_local.offload.plan.free_memory import free_ram, group_limits

GIB = 2**30
LEAST_DISK = 40 * GIB
"""Mixtral 8x7B's experts in 4 bits take 24 GB, in addition to a download."""
LEAST_RAM = 4 * GIB
SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile"),
    *("amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""Instruction sets worth naming, as Linux calls them."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """The processor's name, cores and, on Linux, instruction sets."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    except OSError:
        pass
    sets = [word for word in SETS if word in flags]
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    text = f"{name}, {cores} cores, {os.cpu_count()} threads" + (f"; {' '.join(sets)}" if sets else "")
    return Finding("CPU", text, facts={"cpu": name, "cores": cores, "sets": sets})


def threads() -> Finding:
    """How many threads compute, compared with the cores that this process may use."""
    used = torch.get_num_threads()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
    text, facts = f"{used}, of {allowed} that may be used", {"threads": used, "allowed": allowed}
    if used < cores:
        return warn("threads", text, f"unset OMP_NUM_THREADS and MKL_NUM_THREADS, or set {cores}", **facts)
    if used > allowed:
        return warn(
            "threads", text, f"set OMP_NUM_THREADS={cores}: more than there are hinder each other", **facts
        )
    return Finding("threads", text, facts=facts)


def numa(nodes: Path = Path("/sys/devices/system/node")) -> Finding:
    """How many NUMA nodes there are; one if the system does not tell."""
    count = sum(1 for node in nodes.glob("node[0-9]*") if any(node.glob("cpu[0-9]*"))) or 1
    if count > 1:
        return warn(
            "NUMA",
            f"{count} nodes: a core reads another node's memory slower",
            "numactl --interleave=all moe-local ..., or --cpunodebind=0 --membind=0 if the model fits one",
            nodes=count,
        )
    return Finding("NUMA", "one node", facts={"nodes": 1})


def memory() -> Finding:
    """RAM: how much there is, and how much of it is free."""
    total, free = int(psutil.virtual_memory().total), free_ram(reserve=False)
    text, facts = f"{format_bytes(total)}, {format_bytes(free)} free", {"bytes": total, "free": free}
    limits = [group.limit for group in group_limits() if group.limit < total]
    if limits:
        text += f", {format_bytes(min(limits))} allowed by the control group"
        facts["limit"] = min(limits)
    if free < LEAST_RAM:
        return warn("RAM", text, "end other programs, or give the container or WSL more memory", **facts)
    return Finding("RAM", text, facts=facts)


def is_wsl(release: Path = Path("/proc/sys/kernel/osrelease")) -> bool:
    """Whether this is Linux inside Windows (WSL)."""
    try:
        return "microsoft" in release.read_text().lower()
    except OSError:
        return False


def locked_limit() -> int | None:
    """Bytes that this process may lock (`ulimit -l`); None if there is no limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def pinned(limit: int | None, *, cuda: bool, wsl: bool) -> Finding:
    """How much memory may be pinned for copies to a GPU.

    In WSL, Windows sets the limit, to about half of the RAM that WSL was given.
    """
    total = int(psutil.virtual_memory().total)
    text = "no limit" if limit is None else f"ulimit -l is {format_bytes(limit)}"
    facts = {"limit": limit, "wsl": wsl}
    if wsl:
        text += f"; in WSL about {format_bytes(total // 2)}, half of what it was given"
        if cuda:
            remedy = "raise memory= in .wslconfig, then wsl --shutdown; or stay below it with --ram"
            return warn("pinned memory", text, remedy, **facts)
    if cuda and limit is not None and limit < total // 2:
        return warn(
            "pinned memory",
            text,
            "NVIDIA's driver mostly pins beyond it; if it is refused: ulimit -l unlimited, or memlock in "
            "/etc/security/limits.conf (containers: --ulimit memlock=-1)",
            **facts,
        )
    return Finding("pinned memory", text if cuda else f"{text}; without a GPU none is needed", facts=facts)


def disks(home: Path, downloads: Path) -> Iterator[Finding]:
    """Free disk space for converted experts and for downloads."""
    yield disk("disk for experts", home, "MOE_LOCAL_HOME")
    yield disk("disk for downloads", downloads, "HF_HUB_CACHE")


def disk(name: str, folder: Path, variable: str) -> Finding:
    """Whether a folder, or its nearest existing parent, can be written, and its free bytes."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        usage = shutil.disk_usage(there)
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror or error}"
        return fail(name, text, f"set {variable} to a folder that can", folder=str(folder))
    text, facts = f"{format_bytes(usage.free)} free ({folder})", {"folder": str(folder), "free": usage.free}
    if usage.free < LEAST_DISK:
        return warn(name, text, f"make room, or set {variable} to a folder on a larger disk", **facts)
    return Finding(name, text, facts=facts)
