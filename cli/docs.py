"""Writes docs/cli.md from the commands themselves: `python -m moe_local.cli.docs > docs/cli.md`."""

from __future__ import annotations

import click

from moe_local.cli.main import EXIT_CODES, main

WIDTH = 100

INTRODUCTION = """\
# The moe-local command

Made from `moe-local --help` by `python -m moe_local.cli.docs > docs/cli.md`; a test compares the two.

Sizes are written `20GiB`, `512MiB` or `1.5GB`. Every flag that changes what a model does has a variable,
shown behind it, and the flag wins over the variable. Downloaded models are in the Hugging Face cache
(`HF_HOME`), converted experts below `MOE_LOCAL_HOME` (default: the user's cache folder); gated models need
`HF_TOKEN`. Errors are one line on stderr; `--debug` shows the trace.
"""


def reference() -> str:
    """The whole page, in Markdown."""
    context = _context(main, "moe-local", None)
    parts = [INTRODUCTION, _exit_codes(), _section("moe-local", main, context)]
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        parts.append(_section(f"moe-local {name}", command, _context(command, name, context)))
    return "\n".join(parts)


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    sizes = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, info_name=name, parent=parent, **{**command.context_settings, **sizes})


def _exit_codes() -> str:
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES)
    return f"| exit code | meaning |\n| --- | --- |\n{rows}\n"


def _section(title: str, command: click.Command, context: click.Context) -> str:
    return f"## {title}\n\n```\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    click.echo(reference(), nl=False)
