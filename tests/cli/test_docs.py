from __future__ import annotations

import re

import click

from moe_local.cli.docs import reference
from moe_local.cli.main import main


def words(text: str) -> list[str]:
    """Without line breaks, which differ between click's releases."""
    return re.split(r"\s+", text.strip())


def test_docs_cli_md_is_what_help_says(repository):
    page = (repository / "docs" / "cli.md").read_text()
    assert words(page) == words(reference()), "run: python -m moe_local.cli.docs > docs/cli.md"


def test_every_command_is_there():
    for name in main.list_commands(click.Context(main)):
        assert f"## moe-local {name}\n" in reference()
