"""The `moe-local` command: its subcommands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

import moe_local
from moe_local.cache.errors import MoeLocalError
from moe_local.cli.bench import bench
from moe_local.cli.calibrate import calibrate
from moe_local.cli.chat import chat
from moe_local.cli.convert import convert, pull
from moe_local.cli.fit import fit
from moe_local.cli.options import debug_flag
from moe_local.cli.remove import rm
from moe_local.cli.run import run
from moe_local.cli.serve import serve
from moe_local.cli.show import list_models, show
from moe_local.cli.verify import verify

USAGE = 2
INTERRUPTED = 130

EXIT_CODES = (
    (0, "done"),
    (1, "failed"),
    (USAGE, "wrong usage: an unknown flag or command, a value that is not allowed"),
    (3, "the model does not fit the memory or the disk"),
    (4, "model not found"),
    (INTERRUPTED, "interrupted by Ctrl-C"),
)


class MoeLocal(click.Group):
    """A group whose errors are one line on stderr, `moe-local: ...`, and an exit code of their own."""

    debug = False
    """Whether to show the trace of an error; set by --debug while arguments are parsed."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown command offers the nearest ones."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            names = self.list_commands(ctx)
            near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
            raise click.UsageError(f"no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> NoReturn:
        """Run and exit; never returns."""
        self.debug = False
        settings["standalone_mode"] = False
        try:
            code = super().main(args, *others, **settings)
        except Exception as error:
            code = self._report(error)
        sys.exit(code if isinstance(code, int) else 0)

    def _report(self, error: Exception) -> int:
        """Say what happened; the exit code."""
        if isinstance(error, click.Abort):
            return INTERRUPTED if isinstance(error.__context__, KeyboardInterrupt) else 1
        if self.debug:
            traceback.print_exception(error)
        if isinstance(error, click.UsageError):
            where = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
            return self._line(error.format_message().rstrip(".") + where, USAGE)
        if isinstance(error, click.ClickException):
            return self._line(error.format_message(), error.exit_code)
        if isinstance(error, MoeLocalError):
            return self._line(str(error), error.exit_code)
        hint = "" if self.debug else " (--debug shows where)"
        return self._line(f"{type(error).__name__}: {error}{hint}", 1)

    def _line(self, message: str, code: int) -> int:
        click.echo(f"moe-local: {' '.join(message.split())}", err=True)
        return code


@click.group(cls=MoeLocal, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(moe_local.__version__, message="moe-local %(version)s")
@debug_flag
def main() -> None:
    """Run Mixture-of-Experts language models on a GPU, or a CPU, that cannot hold them.

    MODEL is an alias (mixtral-8x7b; `moe-local list --all` names all), a Hugging Face id, a folder with a
    checkpoint, or demo, the small model in the package.
    """


for command in (chat, run, serve, fit, bench, convert, pull, verify, calibrate, list_models, show, rm):
    main.add_command(command)
