"""Names that changed between releases of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def cache_name(function: Callable[..., Any]) -> str:
    """The name of a transformers function's cache argument, which releases from 5.24 on rename."""
    names = inspect.signature(function).parameters
    return next((name for name in ("cache", "cache_params") if name in names), "past_key_values")
