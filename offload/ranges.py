"""What the settings of sampling may be: one table for Python, the command's flags and the server's fields.

It needs no torch, so that a flag is refused before a model is looked for, let alone loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from sys import float_info
from typing import Any

from moe_local.cache.errors import OptionError

SEEDS = 2**64
"""How many torch's generators tell apart."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, ends included."""

    low: float
    high: float = inf
    whole: bool = False
    above: bool = False
    """Whether `low` itself is left out."""

    def holds(self, value: object) -> bool:
        kinds = int if self.whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        most = self.high if self.whole else min(self.high, float_info.max)
        return self.low <= value <= most and not (self.above and value == self.low)

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a number"
        if self.above:
            return f"{number} above {self.low}" + ("" if self.high == inf else f", {self.high} at most")
        return f"{number}, " + (
            f"{self.low} or more" if self.high == inf else f"from {self.low} to {self.high}"
        )


RANGES: Mapping[str, Range] = {
    "temperature": Range(0),
    "top_k": Range(0, whole=True),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "typical_p": Range(0, 1, above=True),
    "repetition_penalty": Range(0, above=True),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "max_new_tokens": Range(1, whole=True),
    "max_length": Range(1, whole=True),
    "min_new_tokens": Range(0, whole=True),
    "min_length": Range(0, whole=True),
    "max_time": Range(0),
    "num_beams": Range(1, whole=True),
    "num_return_sequences": Range(1, whole=True),
    "logprobs": Range(0, 20, whole=True),
    "seed": Range(-SEEDS // 2, SEEDS // 2 - 1, whole=True),
}
"""By transformers' names for them; transformers quietly ignores some values that lie outside."""


def check_range(name: str, value: object, *, called: str | None = None) -> None:
    """Raises OptionError for a value that RANGES[name] does not hold; None is left to the model.

    `called`: what whoever gave the value calls the setting.
    """
    if value is not None and not RANGES[name].holds(value):
        raise OptionError(f"{called or name} is {value!r}; it must be {RANGES[name]}")


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options, numbers of other libraries (numpy's) as Python's own, which is what is checked."""
    return {name: plain_number(value) for name, value in options.items()}


def plain_number(value: Any) -> Any:
    """A number as Python's own int or float; anything else as it is."""
    if isinstance(value, int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def nth_seed(seed: int, n: int) -> int:
    """The n-th seed from `seed` on; the lowest follows the highest."""
    lowest = -SEEDS // 2
    return (seed + n - lowest) % SEEDS + lowest
