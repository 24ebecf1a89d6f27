"""What the host does for a token, by the host's way and by the device's: a few tokens of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def test_both_ways_are_measured(finished: Callable[..., dict[str, Any]]) -> None:
    document = finished("host_part", "--tokens", "6", "--slots", "16")
    rates = document["hit_rate"]
    assert 0 < rates["by_host"] < 1
    assert rates["by_device"] == pytest.approx(rates["by_host"], abs=0.1)
    assert document["by_host_ms"] > 0
    assert all(ms > 0 for ms in document["by_device_ms"].values())
