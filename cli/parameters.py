"""Sampling settings as names and text values, as in `/set`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import replace

from moe_local.cache.errors import OptionError
from moe_local.cli.options import Sampling

KINDS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "max_tokens": int,
}
ALSO = {"num_predict": "max_tokens", "temp": "temperature"}
"""Names of the same settings in other programs."""
DEFAULT = "default"
"""The value that leaves a setting to the model."""


def with_setting(sampling: Sampling, name: str, value: str) -> Sampling:
    """`sampling` with one setting changed. Raises OptionError for an unknown name or an invalid value."""
    known = name.lower().replace("-", "_")
    known = ALSO.get(known, known)
    if known not in KINDS:
        near = difflib.get_close_matches(known, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
        raise OptionError(f"unknown parameter {name!r}; {hint}")
    if not value:
        raise OptionError(f"{known} needs a value; {DEFAULT} leaves it to the model")
    if value == DEFAULT:
        return replace(sampling, **{known: None})
    kind = KINDS[known]
    try:
        changed = replace(sampling, **{known: kind(value)})  # type: ignore[arg-type]
    except ValueError:
        kinds = "a whole number" if kind is int else "a number"
        raise OptionError(f"{known} is {value!r}; give {kinds}, or {DEFAULT}") from None
    changed.check()
    return changed


def settings(sampling: Sampling) -> Iterator[tuple[str, str]]:
    """Names and values of settings, the system prompt and what the model is told of thoughts left out."""
    for name in KINDS:
        value = getattr(sampling, name)
        yield name, f"{DEFAULT} (the model's own)" if value is None else str(value)
    if sampling.chat_template_kwargs:
        yield "chat_template_kwargs", json.dumps(sampling.chat_template_kwargs, ensure_ascii=False)
