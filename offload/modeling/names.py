"""Names that changed between releases of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def cache_name(function: Callable[..., Any]) -> str:
    """What a function of transformers calls the cache it is given; 5.24 began to rename it."""
    names = inspect.signature(function).parameters
    return next((name for name in ("cache", "cache_params") if name in names), "past_key_values")
