"""Reading text for a model from files and stdin, with checks before the model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from moe_local.cache.errors import OptionError
from moe_local.cache.files import parse_json

LONGEST = 64 << 20
"""Limit on the characters read from stdin; more than the longest context holds."""


def read_text_file(
    path: Path, what: str = "the text to calibrate on", remedy: str = "give some thousand words"
) -> str:
    """The text of a file; - is stdin. Raises OptionError if it cannot be read, is not UTF-8, or is blank."""
    try:
        with click.open_file(str(path), encoding="utf-8-sig") as file:  # some editors begin with a mark
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
    """The rest of stdin or, with `line`, its next line with the line break; "" at the end of input.

    Raises OptionError for text that is not UTF-8, or is longer than any model reads, before it fills memory.
    """
    try:
        text = sys.stdin.readline(LONGEST) if line else sys.stdin.read(LONGEST)
        text.encode()  # in the C locale, Python decodes invalid bytes to lone surrogates instead of failing
    except UnicodeError:
        raise OptionError("stdin is not text in UTF-8; encode it as UTF-8") from None
    if len(text) == LONGEST:
        raise OptionError(f"stdin has {LONGEST >> 20} MiB or more; give a prompt")
    return text


def read_schema_file(path: Path) -> dict[str, Any]:
    """The JSON schema in a file. Raises OptionError if it holds no JSON object; its contents are checked
    later."""
    text = read_text_file(path, "the JSON schema", 'give one, such as {"type": "object"}')
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise OptionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise OptionError(f'{path} holds no JSON schema; give an object, such as {{"type": "object"}}')
    return schema
