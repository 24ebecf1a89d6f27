"""Limiting a process's memory, page cache included, with control groups of version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
SYSTEMD = Path("/run/systemd/system")
ENTER = 'echo $$ > "$0" && exec "$@"'
"""Shell script that moves its own process into the group and then executes the command."""


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[list[str]]:
    """Yields a prefix for a command that limits it and its children to `limit` bytes, without swap.

    Raises SystemExit, with what to do, if no such limit can be set.
    """
    if SYSTEMD.exists() and shutil.which("systemd-run"):
        yield systemd_command(limit)
        return
    try:
        folder, files = _make(limit)
    except OSError as error:
        raise SystemExit(
            f"no memory limit can be set here ({error.strerror}: {error.filename}); run it as root, under "
            "systemd, or in a container with a limit of its own (docker run --memory 2g) and --limit none"
        ) from error
    try:
        yield ["sh", "-c", ENTER, str(files)]
    finally:
        folder.rmdir()


def systemd_command(limit: int) -> list[str]:
    whose = [] if os.geteuid() == 0 else ["--user"]
    bounds = ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
    return ["systemd-run", *whose, "--scope", "--quiet", *bounds, "--"]


def _make(limit: int) -> tuple[Path, Path]:
    """Make a group with this limit; returns its folder, and its file for process ids. Raises OSError."""
    root = next((r for r in (GROUPS / "memory", GROUPS) if (r / "cgroup.procs").exists()), GROUPS / "memory")
    folder = root / f"moe-local-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        if (folder / "memory.limit_in_bytes").exists():
            (folder / "memory.limit_in_bytes").write_text(str(limit))
            swap = folder / "memory.memsw.limit_in_bytes"
        else:
            (folder / "memory.max").write_text(str(limit))
            swap = folder / "memory.swap.max"
        if swap.exists():
            swap.write_text(str(limit) if swap.name.startswith("memory.memsw") else "0")
    except OSError:
        folder.rmdir()
        raise
    return folder, folder / "cgroup.procs"


def forget(files: Sequence[Path]) -> None:
    """Drop these files from the page cache; no process may have them mapped. Needs only read permission."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def in_page_cache(files: Sequence[Path]) -> int | None:
    """Bytes of these files in the page cache, by util-linux's fincore; None if that is not installed."""
    if not shutil.which("fincore"):
        return None
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(map(int, done.stdout.split()))
