"""The source text of transformers' classes, for what no attribute tells about their forward."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any


@cache
def class_source(cls: Any) -> str:
    """The text of `cls`, a class of transformers; "" for others, and where the text is not at hand."""
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
