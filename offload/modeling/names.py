"""Names that changed between releases of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def cache_name(function: Callable[..., Any]) -> str:
    """What a function of transformers calls the cache it is given; 5.24 began to rename it."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"
