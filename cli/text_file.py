"""Text that a model is to read, from files and stdin, looked at before the model is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from moe_local.cache.errors import OptionError
from moe_local.cache.files import parse_json

LONGEST = 64 << 20
"""Characters of a prompt: more than the longest context holds."""


def read_text_file(
    path: Path, what: str = "the text to calibrate on", remedy: str = "give some thousand words"
) -> str:
    """What is in it; - is stdin. Raises OptionError where that is no UTF-8, or nothing but white space."""
    try:
        with click.open_file(str(path), encoding="utf-8") as file:
            text: str = file.read()
    except UnicodeDecodeError:
        raise OptionError(f"{path} cannot be read as text: it is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}") from None
    if not text.strip():
        name = "stdin" if str(path) == "-" else path
        raise OptionError(f"{what} is empty: {name}; {remedy}")
    return text


def read_stdin(*, line: bool = False) -> str:
    """All that is left of stdin, or its next line with the end; "" behind the last.

    Raises OptionError for what is no UTF-8, and for more than any model reads, before it fills the memory.
    """
    try:
        text = sys.stdin.readline(LONGEST) if line else sys.stdin.read(LONGEST)
        text.encode()  # where the locale is C, Python takes other bytes for halves of characters
    except UnicodeError:
        raise OptionError("stdin is not text in UTF-8; encode it as UTF-8") from None
    if len(text) == LONGEST:
        raise OptionError(f"stdin has {LONGEST >> 20} MiB or more; give a prompt")
    return text


def read_schema_file(path: Path) -> dict[str, Any]:
    """The JSON schema in it. Raises OptionError where there is none; what it says is looked at later."""
    text = read_text_file(path, "the JSON schema", 'give one, such as {"type": "object"}')
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise OptionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise OptionError(f'{path} holds no JSON schema; give an object, such as {{"type": "object"}}')
    return schema
