"""Compares the bandwidths that were measured with what they should be."""

from __future__ import annotations

import time
from collections.abc import Iterator

from moe_local.cache.keys import format_bytes, three_digits
from moe_local.offload.doctor.finding import Finding, warn
from moe_local.offload.plan.bandwidth import DISK_FILE, Bandwidths

OLD_S = 180 * 86400.0
"""Machines and drives change; figures older than this are worth the two seconds of a new measurement."""
LINK_SHARE = 0.6
"""Least share of a link's bandwidth, by generation and width, that copies should reach; copies from pinned
memory reach 80 % and more."""
LEAST = {
    "ram": (
        12e9,
        "put memory into both channels, or see what else is running; experts on the CPU are as slow",
    ),
    "disk": (1e9, "put MOE_LOCAL_HOME on an NVMe drive if RAM does not hold the model"),
}
"""Bytes/s below which something is wrong, and what to do."""
WHAT = {
    "ram": ("RAM bandwidth", "read by the CPU"),
    "disk": ("disk bandwidth", "read past the page cache"),
    "h2d": ("link bandwidth", "pinned RAM to the GPU"),
    "vram": ("VRAM bandwidth", "read by the GPU"),
}


def bandwidths(
    known: Bandwidths, when: float | None, *, cuda: bool, link: float | None = None
) -> Iterator[Finding]:
    """A finding for each bandwidth. `when`: the time of the measurement, in seconds since the epoch; `link`:
    bytes/s that the GPU's link should reach."""
    for key in ("ram", "disk", *(("h2d", "vram") if cuda else ())):
        yield _one(key, known, when, link)


def _one(key: str, known: Bandwidths, when: float | None, link: float | None) -> Finding:
    name, what = WHAT[key]
    rate: float = getattr(known, key)
    text = f"{three_digits(rate / 1e9)} GB/s, {what}"
    facts = {"bytes_per_s": rate, "measured": key in known.measured, "measured_at": when}
    if key not in known.measured:
        remedy = (
            "moe-local doctor, without --no-measure, measures it"
            if when is None or key != "disk"
            else f"make room: it writes and reads a file of {format_bytes(DISK_FILE)} in MOE_LOCAL_HOME"
        )
        return warn(name, f"{text}: assumed, not measured", remedy, **facts)
    if when is not None:
        text += f", measured {age(time.time() - when)}"
        if time.time() - when > OLD_S:
            return warn(name, text, "moe-local doctor, without --no-measure, measures it anew", **facts)
    if key == "disk" and known.disk_cached:
        text = text.replace(
            "past the page cache", "perhaps from the page cache: the file system knows no other"
        )
        return Finding(name, text, facts={**facts, "cached": True})
    if key in LEAST and rate < LEAST[key][0]:
        return warn(name, text, LEAST[key][1], **facts)
    if key == "h2d" and link is not None and rate < LINK_SHARE * link:
        text += f", of {three_digits(link / 1e9)} that the link should do"
        return warn(
            name, text, "see that nothing else uses the GPU, and its slot and power settings", **facts
        )
    return Finding(name, text, facts=facts)


def age(seconds: float) -> str:
    """How long ago: "just now", "5 minutes ago", "3 days ago"."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(max(0.0, seconds) // size)
        if count:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"
