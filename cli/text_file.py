"""Text files that a model is to read, looked at before the model is."""

from __future__ import annotations

from pathlib import Path

import click

from moe_local.cache.errors import OptionError


def read_text_file(path: Path) -> str:
    """What is in it; - is stdin. Raises OptionError where that is no UTF-8, or nothing but white space."""
    try:
        with click.open_file(str(path), encoding="utf-8") as file:
            text: str = file.read()
    except UnicodeDecodeError:
        raise OptionError(f"{path} cannot be read as text: it is no UTF-8; save it as that") from None
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}") from None
    if not text.strip():
        name = "what came on stdin" if str(path) == "-" else path
        raise OptionError(f"the text to calibrate on is empty: {name}; give some thousand words")
    return text
