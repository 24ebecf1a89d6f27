"""Sizes in a config that no model has and that would keep the machine busy for hours to build it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_local.cache.errors import CheckpointError

WIDTHS = re.compile(r"(^|_)(sizes?|dims?)($|_)")
"""Fields that name a width, whatever of: "vocab_size_per_layer_input" counts no layers."""

LIMITS = (
    (re.compile(r"(^|_)(n_layers?|layers?|blocks?|depth|stages)($|_)"), 2_000),
    (re.compile(r"(^|_)(experts?|heads?|groups?)($|_)"), 65_536),
)
"""Fields by their names, and the most they may be: transformers makes a module or a list's entry of each."""

LARGEST = 2**40
"""Of any whole number: more than the numbers of a matrix that fits a machine."""

DEPTH = 16
"""Fields within fields."""


def check_config(fields: Mapping[str, Any], depth: int = 0) -> None:
    """Raise CheckpointError, in half a line, for a size beyond all measure in the fields of a config.json."""
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
