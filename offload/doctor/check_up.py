"""All checks of `moe-local doctor`, in order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from moe_local.cache.errors import first_line
from moe_local.offload.doctor.bandwidths import bandwidths
from moe_local.offload.doctor.finding import Finding, fail, warn
from moe_local.offload.doctor.graphics import graphics
from moe_local.offload.doctor.host import (
    disks,
    is_wsl,
    locked_limit,
    memory,
    numa,
    pinned,
    processor,
    threads,
)
from moe_local.offload.doctor.software import kernels, software
from moe_local.offload.plan import bandwidth


def check_up(home: Path, downloads: Path, *, measure: bool = True) -> Iterator[Finding]:
    """Check software, hardware and limits; yields each finding as soon as it is known.

    `home` is the folder of expert files and of the saved bandwidths; `downloads` is the Hub cache. `measure`
    measures and saves bandwidths again (some two seconds, with the machine fully loaded). If something cannot
    be found out, that is a finding, too, and no exception.
    """
    yield from software()
    link: float | None = None
    for finding in graphics():
        link = link if link is not None else finding.facts.get("bytes_per_s")
        yield finding
    cuda = torch.cuda.is_available()
    yield from (processor(), threads(), numa(), memory())
    yield pinned(locked_limit(), cuda=cuda, wsl=is_wsl())
    yield from disks(home, downloads)
    yield from kernels(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    yield from _bandwidths(home, cuda, link, measure)


def _bandwidths(home: Path, cuda: bool, link: float | None, measure: bool) -> Iterator[Finding]:
    if not measure:
        yield from bandwidths(bandwidth.saved(home), bandwidth.saved_at(home), cuda=cuda, link=link)
        return
    try:
        found = bandwidth.measure(home, torch.device("cuda") if cuda else None)
    except RuntimeError as error:  # for example, CUDA is out of memory
        remedy = "end what else uses the GPU and run again"
        yield fail("bandwidths", f"cannot be measured: {first_line(error)}", remedy)
        return
    try:
        bandwidth.save(found, home)
    except OSError as error:
        remedy = "set MOE_LOCAL_HOME to a folder that can be written"
        yield warn("bandwidths", f"cannot be kept: {error.strerror or error}", remedy)
    yield from bandwidths(found, time.time(), cuda=cuda, link=link)
