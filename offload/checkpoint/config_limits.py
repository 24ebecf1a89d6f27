"""Refuses sizes in a config that no model has, and with which building the model would take hours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_local.cache.errors import CheckpointError

WIDTHS = re.compile(r"(^|_)(sizes?|dims?)($|_)")
"""Names of fields that hold a width, not a count: "vocab_size_per_layer_input" does not count layers."""

LIMITS = (
    (re.compile(r"(^|_)(n_layers?|layers?|blocks?|depth|stages)($|_)"), 2_000),
    (re.compile(r"(^|_)(experts?|heads?|groups?)($|_)"), 65_536),
)
"""Names of fields that count something, and their limits: transformers makes a module or list entry of each
thing counted."""

LARGEST = 2**40
"""The limit of all other integers: more than a matrix that fits into a machine has elements."""

DEPTH = 16
"""How deeply fields may be nested."""


def check_config(fields: Mapping[str, Any], depth: int = 0) -> None:
    """Raise CheckpointError, whose message does not name the file, for an absurd size in a config.json."""
    if depth > DEPTH:
        raise CheckpointError(f"it has more than {DEPTH} levels of fields, which no config has")
    for name, value in fields.items():
        for found in value if isinstance(value, list) else [value]:
            if isinstance(found, Mapping):
                check_config(found, depth + 1)
            elif isinstance(found, int) and not isinstance(found, bool):
                counts = [] if WIDTHS.search(name) else LIMITS
                limit = next((most for names, most in counts if names.search(name)), LARGEST)
                if abs(found) > limit:
                    shown = f"{found:.4g}" if abs(found) < 10**300 else f"of {len(str(found))} digits"
                    raise CheckpointError(f"{name} is {shown}, and no model has more than {limit:.4g}")
