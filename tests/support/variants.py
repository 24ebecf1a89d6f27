"""Variants of a test, of which only some run each time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def others_slow(values: Iterable[Any], ordinary: Collection[Any]) -> list[Any]:
    """`values` for parametrize, those that are not `ordinary` marked slow. Tuples are several arguments."""
    found = list(values)
    assert all(value in found for value in ordinary), "an ordinary variant that there is not"

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in ordinary else slow(value) for value in found]
