"""How fast this machine moves bytes: measured once, saved, and used by the planner and the scheduler.

Decoding one token at a time is bound by memory traffic, so these four figures decide how fast a placement is.
Figures that were not measured yet have default values, and their users say so.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

from moe_local.cache.files import parse_json, write_atomically
from moe_local.cache.keys import format_bytes
from moe_local.offload.native.library import check, library
from moe_local.offload.system.direct_io import page_memory
from moe_local.offload.system.read_at import open_directly, open_for_reading, read_at

DEFAULT_VRAM = 936e9
"""Bytes/s, an RTX 3090's data sheet; a 4090 has 1008e9, the 16 GB cards 290e9 to 740e9."""
DEFAULT_RAM = 60e9
"""Bytes/s that a good read loop reaches on dual-channel DDR5-4800 (76.8e9 by data sheet)."""
DEFAULT_H2D = 25e9
"""Bytes/s, pinned memory over PCIe 4.0 x16 (31.5e9 by data sheet)."""
DEFAULT_DISK = 2.5e9
"""Bytes/s, an NVMe drive on PCIe 3.0 x4, or one on PCIe 4.0 that reads experts in random order."""

FILE_NAME = "bandwidths.json"
MIB = 2**20
RAM_BUFFER = 256 * MIB
MOST_RAM_BUFFER = 2048 * MIB
CACHES = 4
"""How many times the last-level caches' bytes a buffer has that they do not speed up: server processors have
300 MB, in which RAM_BUFFER would stay from one reading to the next."""
DISK_FILE = 256 * MIB
DISK_PIECE = 4 * MIB
DISK_THREADS = 4
"""Four reads of 4 MiB in flight reach a drive's sequential speed at every expert size that was tried."""
DISK_SECONDS = 0.5
"""Writing the file takes this long at most, and so does reading it."""
COPY_BUFFER = 128 * MIB
VRAM_READS = 8
"""How often a buffer in VRAM is read between two waits: reading it once takes a fast GPU 60 microseconds, and
the launch and the wait some ten."""
SECONDS = 0.35
"""How long each of the four is measured."""


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes per second: reading VRAM by the GPU, RAM by the CPU, pinned RAM over the link, the disk."""

    vram: float = DEFAULT_VRAM
    ram: float = DEFAULT_RAM
    h2d: float = DEFAULT_H2D
    disk: float = DEFAULT_DISK
    measured: frozenset[str] = frozenset()
    """Which of the four were measured on this machine; the others are defaults."""
    disk_cached: bool = False
    """Whether `disk` could not bypass the page cache, and so says little about the disk."""

    def assumed(self, names: Iterable[str]) -> bool:
        """Whether any of these four names is a default rather than a measurement."""
        return not set(names) <= self.measured

    def to_dict(self) -> dict[str, float | list[str] | bool]:
        return {**asdict(self), "measured": sorted(self.measured)}


def measure(folder: Path, device: torch.device | None = None) -> Bandwidths:
    """Measure this machine, in less than two seconds: the disk that holds `folder`, RAM, a CUDA `device`.

    A disk that cannot be written (read-only, full) keeps the default. Blocks; loads the machine fully.
    """
    found: dict[str, float] = {"ram": ram_bandwidth()}
    cached = False
    with contextlib.suppress(OSError):
        found["disk"], cached = disk_bandwidth(folder)
    if device is not None and device.type == "cuda":
        found["h2d"] = h2d_bandwidth(device)
        found["vram"] = vram_bandwidth(device)
    return replace(Bandwidths(disk_cached=cached), **found, measured=frozenset(found))  # type: ignore[arg-type]


def measure_links(known: Bandwidths, device: torch.device) -> Bandwidths:
    """`known`, with the assumed figures of RAM, a CUDA `device`'s memory and the link between them measured.

    Takes about a second. A figure for whose measurement the device has no memory left keeps its default.
    """
    rates: dict[str, Callable[[], float]] = {
        "ram": ram_bandwidth,
        "h2d": lambda: h2d_bandwidth(device),
        "vram": lambda: vram_bandwidth(device),
    }
    found: dict[str, float] = {}
    for name, rate in rates.items():
        if known.assumed([name]):
            with contextlib.suppress(RuntimeError):  # CUDA is out of memory, for one
                found[name] = rate()
    return replace(known, **found, measured=known.measured | frozenset(found))  # type: ignore[arg-type]


def ram_bandwidth(nbytes: int | None = None) -> float:
    """Bytes/s of reading a buffer of `nbytes` (None: far more than the caches hold) with all of torch's
    threads."""
    nbytes = beyond_caches(last_level_caches()) if nbytes is None else nbytes
    buffer = torch.ones(nbytes // 8, dtype=torch.int64)
    return nbytes / _fastest(lambda: read_sum(buffer))


def beyond_caches(caches: int) -> int:
    """Bytes of a buffer that caches of so many bytes do not speed up, as far as RAM allows."""
    most = min(MOST_RAM_BUFFER, int(psutil.virtual_memory().available) // 16)
    return max(RAM_BUFFER, min(CACHES * caches, most)) // 8 * 8


def last_level_caches(processors: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the processors' third-level caches together; 0 where the system does not tell."""
    sizes = {}
    for cache in processors.glob("cpu[0-9]*/cache/index3"):
        with contextlib.suppress(OSError, ValueError):
            size = (cache / "size").read_text().strip()
            sizes[(cache / "shared_cpu_list").read_text()] = int(size.removesuffix("K")) << 10
    return sum(sizes.values())


def read_sum(buffer: torch.Tensor) -> int:
    """The sum of a contiguous int64 buffer on the CPU, modulo 2^64, by the C++ library or else by torch."""
    lib = library()
    if lib is None:
        return int(buffer.sum()) % 2**64
    total = ctypes.c_uint64()
    check(lib.moe_read(buffer.data_ptr(), buffer.nbytes, ctypes.byref(total), torch.get_num_threads()))
    return total.value


def disk_bandwidth(folder: Path, nbytes: int = DISK_FILE) -> tuple[float, bool]:
    """(bytes/s of reading a new file in `folder` from the disk, whether the page cache may have helped).

    Writes at most `nbytes` for at most half a second and removes them again. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="bandwidth-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            length = _write_for(file.fileno(), nbytes)
            os.fsync(file.fileno())
        direct = open_directly(name)
        cached = direct is None
        source = open_for_reading(name) if direct is None else direct
        try:
            if cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
            return _read_for(source, length), cached
        finally:
            os.close(source)
    finally:
        os.unlink(name)


def h2d_bandwidth(device: torch.device) -> float:
    """Bytes/s of copying pinned memory to a CUDA device."""
    source = torch.ones(COPY_BUFFER, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BUFFER, dtype=torch.uint8, device=device)
    return COPY_BUFFER / _fastest(lambda: target.copy_(source, non_blocking=True), device)


def vram_bandwidth(device: torch.device) -> float:
    """Bytes/s of summing a buffer in a CUDA device's memory, beyond its last cache."""
    buffer = torch.ones(RAM_BUFFER // 8, dtype=torch.int64, device=device)

    def read() -> None:
        for _ in range(VRAM_READS):
            buffer.sum()

    return VRAM_READS * RAM_BUFFER / _fastest(read, device)


def saved(folder: Path) -> Bandwidths:
    """What was measured on this machine and kept in `folder`; the defaults if nothing was."""
    kept = _read(folder).get(machine())
    if not isinstance(kept, dict):
        return Bandwidths()
    try:
        rates = {name: float(kept[name]) for name in ("vram", "ram", "h2d", "disk")}
        if not all(0 < rate < float("inf") for rate in rates.values()):
            return Bandwidths()
        return Bandwidths(
            **rates,
            measured=frozenset(str(name) for name in kept["measured"]),
            disk_cached=bool(kept["disk_cached"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return Bandwidths()


def saved_at(folder: Path) -> float | None:
    """When the `saved` figures were measured, in seconds since the epoch; None if unknown or never."""
    kept = _read(folder).get(machine())
    when = kept.get("saved_at") if isinstance(kept, dict) else None
    return float(when) if isinstance(when, int | float) and 0 <= when < 1e11 else None


def save(bandwidths: Bandwidths, folder: Path) -> Path:
    """Keep the figures of this machine in `folder`, beside those of others that share it. Atomic."""
    folder.mkdir(parents=True, exist_ok=True)
    machines = {**_read(folder), machine(): {**bandwidths.to_dict(), "saved_at": time.time()}}
    path = folder / FILE_NAME
    write_atomically(path, [json.dumps(machines, indent=1), "\n"])
    return path


def machine() -> str:
    """What the figures depend on, as a short key: processor, cores, memory, GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    parts = [_processor(), str(os.cpu_count()), format_bytes(psutil.virtual_memory().total), *gpus]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return f"{parts[0]} x{parts[1]} {digest}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(folder: Path) -> dict[str, object]:
    """The kept file; an absent or damaged one counts as empty, since measuring again repairs it."""
    try:
        machines = parse_json((folder / FILE_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return machines if isinstance(machines, dict) else {}


def _fastest(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of the fastest of several runs within SECONDS; the first, which warms up, does not count."""
    best = float("inf")
    work()
    _synchronize(device)
    deadline = time.perf_counter() + SECONDS
    while True:
        start = time.perf_counter()
        work()
        _synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > deadline:
            return best


def _synchronize(device: torch.device | None) -> None:
    if device is not None:
        torch.cuda.current_stream(device).synchronize()


def _write_for(descriptor: int, nbytes: int) -> int:
    """Write pieces of random bytes, at least one, until `nbytes` or DISK_SECONDS are spent; bytes written."""
    piece = os.urandom(DISK_PIECE)
    deadline = time.perf_counter() + DISK_SECONDS
    written = 0
    while written < nbytes and (written == 0 or time.perf_counter() < deadline):
        written += os.write(descriptor, piece)
    return written


def _read_for(descriptor: int, length: int) -> float:
    """Bytes/s of reading the file once, or as far as DISK_SECONDS go, several pieces in flight."""
    # Memory as in slots: page-aligned for O_DIRECT, and in huge pages, since a request that is scattered
    # over a thousand small pages was seen to take twice as long.
    memory = page_memory(DISK_THREADS * DISK_PIECE).zero_()
    buffers = [memory[i * DISK_PIECE : (i + 1) * DISK_PIECE].numpy().data for i in range(DISK_THREADS)]
    start = time.perf_counter()

    def read(worker: int) -> int:
        count = 0
        for offset in range(worker * DISK_PIECE, length, DISK_THREADS * DISK_PIECE):
            count += read_at(descriptor, buffers[worker], offset)
            if time.perf_counter() - start > DISK_SECONDS:
                break
        return count

    with ThreadPoolExecutor(DISK_THREADS) as pool:
        total = sum(pool.map(read, range(DISK_THREADS)))
    return total / (time.perf_counter() - start)
