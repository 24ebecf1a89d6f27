from __future__ import annotations

import pytest

from moe_local.cache.errors import OptionError
from moe_local.cache.keys import ExpertKey, format_bytes, parse_bytes, three_digits


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20GiB", 20 * 2**30),
        ("20 gib", 20 * 2**30),
        ("20G", 20 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        (".5K", 512),
        ("7", 7),
        (7, 7),
        (2.5e9, 2_500_000_000),
    ],
)
def test_sizes_are_read(text: str | int | float, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", "GiB", "20 PiB", "-3GiB", "1e9", "0", 0, -1, "9999999TiB", True, 1.5, "1.5"),
        *(float("nan"), float("inf"), 10**400, "1" * 400),
    ],
)
def test_what_is_no_size_is_refused(text: str | int | float) -> None:
    with pytest.raises(OptionError, match=r"budget .* is not a size"):
        parse_bytes(text, "budget")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (9.999 * 2**10, "10.0 KiB"),
        (99.99 * 2**20, "100 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (20 * 2**30, "20.0 GiB"),
        (3 * 2**50, "3072 TiB"),
    ],
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.01234, "0.0123"), (12.345, "12.3"), (999.4, "999"), (999.7, "1000"), (3350.4, "3350")],
)
def test_numbers_are_written_without_an_exponent(number: float, text: str) -> None:
    assert three_digits(number) == text


def test_names() -> None:
    assert ExpertKey(layer=1, expert=2) == (1, 2)
