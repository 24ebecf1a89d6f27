"""The key of an expert; how numbers of bytes are parsed, and how they and other numbers are formatted."""

from __future__ import annotations

import re
from typing import NamedTuple

from moe_local.cache.errors import OptionError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class ExpertKey(NamedTuple):
    """One routed expert. `layer` counts MoE layers from 0, not decoder layers; `expert` counts from 0."""

    layer: int
    expert: int


def parse_bytes(text: str | int | float, what: str = "size") -> int:
    """Bytes in "20GiB", "1.5 GB", "512M" or a plain number of bytes; `what` names the value in the error.

    GiB, MiB (and G, M) are powers of two, GB and MB powers of ten. Raises OptionError.
    """
    number: int | float
    if isinstance(text, int | float) and not isinstance(text, bool):
        number, unit = text, ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
        if match is None or match[2].upper() not in UNITS:
            raise OptionError(f"{what} {text!r} is not a size; write for example 20GiB, 512MiB or 1.5GB")
        number, unit = float(match[1]), match[2].upper()
    count = number * UNITS[unit]
    if not 0 < count < 2**63:
        limit = f"it must be below {format_bytes(2**63)}" if count > 0 else "it must be above 0"
        raise OptionError(f"{what} {text!r} is not a size; {limit}")
    if UNITS[unit] == 1 and count % 1:
        raise OptionError(f"{what} {text!r} is not a size: it has no unit; write for example {text}GiB")
    return int(count)


def format_bytes(count: int | float) -> str:
    """1536 -> "1.50 KiB": powers of two; three significant digits, or all digits of a longer whole part."""
    if abs(count) < 1024:
        return f"{int(count)} B"
    value = count / 1024
    for unit in ("KiB", "MiB", "GiB"):  # noqa: B007 - used after the loop
        if abs(value) < 1023.5:  # what rounds to 1024 is written in the next unit
            break
        value /= 1024
    else:
        unit = "TiB"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def three_digits(number: float) -> str:
    """3350.4 -> "3350", 12.345 -> "12.3": three significant digits, or all digits of a longer whole part."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"
