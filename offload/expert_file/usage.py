"""Counts how often each expert was chosen, over all runs, in a file beside the expert file."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from moe_local.cache.files import locked, parse_json, write_atomically
from moe_local.cache.stats import RoutedTokens

FILE_NAME = "usage.json"

PATIENCE_S = 10.0
"""Longest wait for the lock. Adding takes a moment, so a process that holds it for longer is stuck, and the
close of a model must not wait for it."""


def read_usage(folder: Path) -> RoutedTokens | None:
    """The counts of all earlier runs with the expert file in `folder`; None if there are none yet.

    A damaged file counts as none: no result depends on these figures.
    """
    try:
        fields = parse_json((folder / FILE_NAME).read_bytes())
        counts = tuple(tuple(int(n) for n in layer) for layer in fields["counts"])
        tokens = tuple(int(n) for n in fields["tokens"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return RoutedTokens(counts, tokens) if len(tokens) == len(counts) else None


def add_usage(folder: Path, routed: RoutedTokens) -> None:
    """Add one run's counts to those in `folder`, atomically, one process at a time.

    A folder that is read-only, gone, or locked for PATIENCE_S by another process keeps what it has.
    """
    if not any(routed.tokens):
        return
    with suppress(OSError), locked(folder / FILE_NAME, timeout_s=PATIENCE_S):
        before = read_usage(folder)
        total = routed if before is None or _shape(before) != _shape(routed) else before + routed
        write_atomically(
            folder / FILE_NAME, [json.dumps({"counts": total.counts, "tokens": total.tokens}), "\n"]
        )


def _shape(routed: RoutedTokens) -> list[int]:
    """How many experts each layer has."""
    return [len(counts) for counts in routed.counts]
