"""Counts of chosen experts over all runs, beside the expert file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_local.cache.files import locked
from moe_local.cache.stats import RoutedTokens
from moe_local.offload.expert_file import usage
from moe_local.offload.expert_file.usage import FILE_NAME, add_usage, read_usage

FIRST = RoutedTokens(((3, 1, 0), (2, 2, 0)), (2, 2))
SECOND = RoutedTokens(((1, 0, 1), (0, 0, 2)), (1, 1))


def test_runs_add_up(tmp_path: Path) -> None:
    assert read_usage(tmp_path) is None
    add_usage(tmp_path, FIRST)
    assert read_usage(tmp_path) == FIRST
    add_usage(tmp_path, SECOND)
    assert read_usage(tmp_path) == RoutedTokens(((4, 1, 1), (2, 2, 2)), (3, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, f"{FILE_NAME}.lock"]


def test_a_run_that_routed_nothing_writes_nothing(tmp_path: Path) -> None:
    add_usage(tmp_path, RoutedTokens(((0, 0),), (0,)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "[]",
        "null",
        '{"counts": [[1, 2]]}',
        '{"counts": 3, "tokens": [1]}',
        '{"counts": [["x"]], "tokens": [1]}',
        '{"counts": [[Infinity]], "tokens": [1]}',
        '{"counts": [[3, 1, 0], [2, 2, 0]], "tokens": [2]}',
    ],
)
def test_a_damaged_file_counts_as_none_and_is_replaced(tmp_path: Path, damaged: str) -> None:
    (tmp_path / FILE_NAME).write_text(damaged)
    assert read_usage(tmp_path) is None
    add_usage(tmp_path, FIRST)
    assert read_usage(tmp_path) == FIRST


def test_counts_of_another_shape_are_replaced(tmp_path: Path) -> None:
    add_usage(tmp_path, RoutedTokens(((1, 1),), (1,)))
    add_usage(tmp_path, FIRST)
    assert read_usage(tmp_path) == FIRST


def test_a_folder_that_cannot_be_written_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_usage(tmp_path, FIRST)

    def refuse(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    add_usage(tmp_path, SECOND)
    assert read_usage(tmp_path) == FIRST
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, f"{FILE_NAME}.lock"]
    add_usage(tmp_path / "gone", SECOND)


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    add_usage(tmp_path, FIRST)
    fields = json.loads((tmp_path / FILE_NAME).read_text())
    assert fields == {"counts": [[3, 1, 0], [2, 2, 0]], "tokens": [2, 2]}


def test_a_lock_that_is_never_given_back_costs_the_counts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_usage(tmp_path, FIRST)
    monkeypatch.setattr(usage, "PATIENCE_S", 0.05)
    with locked(tmp_path / FILE_NAME):
        add_usage(tmp_path, SECOND)
    assert read_usage(tmp_path) == FIRST
