"""One line of a check-up."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    """It works, but slower or with less than it could."""
    FAIL = "fail"
    """It does not work until this is repaired."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    text: str
    level: Level = Level.OK
    remedy: str = ""
    """What to do about it; there is one unless the level is ok."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same as data, in plain JSON types."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "level": str(self.level)}


def warn(name: str, text: str, remedy: str, **facts: Any) -> Finding:
    return Finding(name, text, Level.WARN, remedy, facts)


def fail(name: str, text: str, remedy: str, **facts: Any) -> Finding:
    return Finding(name, text, Level.FAIL, remedy, facts)
