"""How often each expert was chosen, kept beside the expert file over all runs."""

from __future__ import annotations

import json
from pathlib import Path

from moe_local.cache.files import parse_json, write_atomically
from moe_local.cache.stats import RoutedTokens

FILE_NAME = "usage.json"


def read_usage(folder: Path) -> RoutedTokens | None:
    """The counts of all earlier runs with the expert file in `folder`; None if there are none yet.

    A damaged file counts as none: the figures inform, nothing depends on them.
    """
    try:
        fields = parse_json((folder / FILE_NAME).read_bytes())
        counts = tuple(tuple(int(n) for n in layer) for layer in fields["counts"])
        tokens = tuple(int(n) for n in fields["tokens"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return RoutedTokens(counts, tokens) if len(tokens) == len(counts) else None


def add_usage(folder: Path, routed: RoutedTokens) -> None:
    """Add one run's counts to those in `folder`, atomically. A read-only folder keeps what it has."""
    if not any(routed.tokens):
        return
    before = read_usage(folder)
    if before is not None and [len(c) for c in before.counts] == [len(c) for c in routed.counts]:
        routed = RoutedTokens(
            tuple(
                tuple(a + b for a, b in zip(new, old, strict=True))
                for new, old in zip(routed.counts, before.counts, strict=True)
            ),
            tuple(a + b for a, b in zip(routed.tokens, before.tokens, strict=True)),
        )
    try:
        write_atomically(
            folder / FILE_NAME, [json.dumps({"counts": routed.counts, "tokens": routed.tokens}), "\n"]
        )
    except OSError:
        return
