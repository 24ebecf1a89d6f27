"""Before a model's first load: check that it fits, and ask whether to download it."""

from __future__ import annotations

import sys
from typing import Any

import click

from moe_local.cache.errors import OptionError
from moe_local.cli.options import Command
from moe_local.cli.render import print_status
from moe_local.offload.system.collector import uncollected

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


@uncollected()
def ready(model: str, options: dict[str, Any], *, replacing: bool = False) -> None:
    """Ask the user if `load(model, **options)` would download something; otherwise do nothing.

    `replacing`: a loaded model will be freed first, so the free memory is not checked. Raises
    DoesNotFitError if VRAM, RAM or disk are too small, OptionError if stdin is not a terminal, and click's
    Abort if the user declines.
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
