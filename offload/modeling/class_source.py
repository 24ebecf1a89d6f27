"""The source text of transformers' classes, for properties of their forward that no attribute shows."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any


@cache
def class_source(cls: Any) -> str:
    """The source text of `cls`, a class of transformers; "" for other classes or if it is unavailable."""
    if not cls.__module__.startswith("transformers."):
        return ""
    try:
        source = _module_source(cls.__module__)
    except (OSError, KeyError, TypeError):
        return ""
    body = re.search(rf"^class {cls.__name__}\b.*?(?=^[@\w]|\Z)", source, re.MULTILINE | re.DOTALL)
    return body[0] if body else ""


@cache
def _module_source(name: str) -> str:
    return inspect.getsource(sys.modules[name])
