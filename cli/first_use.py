"""What comes before a model's first load: whether it can be had at all, and one question."""

from __future__ import annotations

import sys
from typing import Any

import click

from moe_local.cache.errors import OptionError
from moe_local.cli.options import Command
from moe_local.cli.render import print_status

_YES = "moe_local.yes"


def yes_flag(command: Command) -> Command:
    """Add --yes, which `ready` reads."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        context.meta[_YES] = value

    return click.option(
        "--yes",
        "-y",
        is_flag=True,
        expose_value=False,
        callback=remember,
        envvar="MOE_LOCAL_YES",
        show_envvar=True,
        help="Download a model that is not here without asking.",
    )(command)


def ready(model: str, options: dict[str, Any], *, replacing: bool = False) -> None:
    """Ask before `load(model, **options)` would download something; nothing happens if it would not.

    `replacing`: another model goes first, so that more memory will be free than is now. Raises
    DoesNotFitError if VRAM, RAM or disk are too small, OptionError where nobody can be asked, and click's
    Abort for a no.
    """
    from moe_local.offload.options import LoadOptions
    from moe_local.offload.plan.first_use import first_use

    use = first_use(model, LoadOptions.from_keywords(options), memory=not replacing)
    if use is None:
        return
    if click.get_current_context().meta.get(_YES):
        print_status(f"{model} takes {use}.")
    elif not sys.stdin.isatty():
        raise OptionError(f"{model} is not on this machine and takes {use}; add --yes to go on")
    else:
        click.confirm(f"{model} is not on this machine and takes {use}. Go on?", abort=True, err=True)
