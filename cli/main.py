"""The `moe-local` command: its subcommands, and the only place that turns errors into a line and an exit
code."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from moe_local.cache.errors import MoeLocalError
from moe_local.cli import other_names
from moe_local.cli.lazy import LazyGroup
from moe_local.cli.options import debug_flag
from moe_local.offload.system.interrupt import INTERRUPTED, TERMINATED, broken_import

USAGE = 2

EXIT_CODES = (
    (0, "done"),
    (1, "failed"),
    (USAGE, "wrong usage: an unknown flag or command, a value that is not allowed"),
    (3, "the model does not fit the memory or the disk"),
    (4, "model not found"),
    (INTERRUPTED, "interrupted by Ctrl-C"),
    (TERMINATED, "ended by SIGTERM; a server that was serving ends with 0"),
)

COMMANDS = {
    "bench": (
        "bench:bench",
        "Measure MODEL: latency, throughput, and where each millisecond of a token goes.",
    ),
    "calibrate": (
        "calibrate:calibrate",
        "Fit a correction to the guesses of prefetch, from what MODEL computes on some text.",
    ),
    "chat": ("chat:chat", "Talk with MODEL, by default the demo in the package."),
    "completion": (
        "completion:completion",
        "Print the script that completes commands, flags and models in SHELL.",
    ),
    "convert": (
        "convert:convert",
        "Convert the experts of MODEL, one by one, to the format they are run in.",
    ),
    "doctor": (
        "doctor:doctor",
        "Examine this machine: software, GPU and its link, CPU, memory, disk, kernels, bandwidths.",
    ),
    "fit": (
        "fit:fit",
        "Say whether MODEL fits, where its parts go and how fast it may be, without its weights.",
    ),
    "list": (
        "show:list_models",
        "List the models on this machine: checkpoints, and experts converted from them.",
    ),
    "pull": ("convert:pull", "Download MODEL into the Hugging Face cache, safetensors only."),
    "rm": ("remove:rm", "Remove the converted experts of MODEL, and say how much disk space that freed."),
    "run": ("run:run", "Answer PROMPT with MODEL and exit."),
    "serve": (
        "serve:serve",
        "Serve MODEL to OpenAI and Anthropic clients: chat completions, completions, responses, messages.",
    ),
    "show": (
        "show:show",
        "Show the shape of MODEL, its sizes by format, and how its router spreads the load.",
    ),
    "verify": (
        "verify:verify",
        "Compare the converted experts of MODEL, in every format, with their checksums.",
    ),
}
"""Name -> the command's module and attribute below moe_local.cli, and the first sentence of its help."""


_NO_ARGUMENTS: tuple[type[click.UsageError], ...] = tuple(
    filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)])
)
"""The error by which click shows the help if no command is given; older releases print it and exit."""


class MoeLocal(LazyGroup):
    """A group that reports errors as one line on stderr, `moe-local: ...`, and by the exit code."""

    debug = False
    """Whether to show the trace of an error; set by --debug while arguments are parsed."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, but `help COMMAND` is COMMAND --help, and the error for an unknown command suggests
        one that is meant or similar."""
        name = args[0]
        if name == "help" and len(args) > 1:
            return self.resolve_command(ctx, [args[1], "--help"])
        if name == "help":
            click.echo(ctx.get_help())
            ctx.exit()
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            names = self.list_commands(ctx)
            meant = other_names.COMMANDS.get(name.lower())
            near = [meant] if meant else difflib.get_close_matches(name, names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
            raise click.UsageError(f"no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> NoReturn:
        """Run and exit; never returns."""
        self.debug = False
        settings["standalone_mode"] = False
        try:
            _require_folder()
            code = super().main(args, *others, **settings)
        except Exception as error:
            code = self._report(error)
        sys.exit(code if isinstance(code, int) else 0)

    def _report(self, error: Exception) -> int:
        """Print the error; returns the exit code."""
        if isinstance(error, click.Abort):
            return INTERRUPTED if isinstance(error.__context__, KeyboardInterrupt) else 1
        if (code := broken_import()) is not None and not isinstance(error, MoeLocalError):
            return code
        if self.debug:
            traceback.print_exception(error)
        if isinstance(error, _NO_ARGUMENTS):
            error.show()
            return error.exit_code
        if isinstance(error, click.UsageError):
            where = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
            return self._line(_usage(error) + where, USAGE)
        if isinstance(error, click.ClickException):
            return self._line(error.format_message(), error.exit_code)
        if isinstance(error, MoeLocalError):
            return self._line(str(error), error.exit_code)
        from moe_local.cli.render import is_of_output  # imports rich, which most errors do not need

        if is_of_output(error):  # a full disk: click itself ends where nobody reads any more
            return self._line("the output cannot be written: its disk is full; free some of it", 1)
        hint = "" if self.debug else " (--debug shows where)"
        return self._line(f"{type(error).__name__}: {error}{hint}", 1)

    def _line(self, message: str, code: int) -> int:
        click.echo(f"moe-local: {' '.join(message.split())}", err=True)
        return code


def _require_folder() -> None:
    """Raise MoeLocalError if the current folder was removed, at which MKL would end the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise MoeLocalError(f"the current folder: {error.strerror}; change to one that is there") from None


def _usage(error: click.UsageError) -> str:
    """What is wrong with the arguments, without the full stop."""
    if isinstance(error, click.NoSuchOption):
        command = error.ctx.command if error.ctx is not None else None
        hint = other_names.flag_hint(error.option_name, command)
        if hint is None and (near := _nearest(error.option_name, command)):
            hint = f"did you mean {near}?"
        return f"no option {error.option_name}" + (f"; {hint}" if hint else "")
    return error.format_message().rstrip(".")


def _nearest(flag: str, command: click.Command | None) -> str | None:
    """The command's flag that is most like this one, compared without the dashes, which all have."""
    options = [param for param in (command.params if command else []) if isinstance(param, click.Option)]
    known = {name.strip("-"): name for option in options for name in (*option.opts, *option.secondary_opts)}
    return next((known[name] for name in difflib.get_close_matches(flag.strip("-"), known, n=1)), None)


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        import moe_local  # only here, since looking up the version takes as long as all other imports

        click.echo(f"moe-local {moe_local.__version__}")
        context.exit()


@click.group(
    cls=MoeLocal,
    places={name: (f"moe_local.cli.{place}", summary) for name, (place, summary) in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
@debug_flag
def main() -> None:
    """Run Mixture-of-Experts language models on a GPU, or a CPU, that cannot hold them.

    MODEL is an alias (mixtral-8x7b; `moe-local list --all` names all), a Hugging Face id, a folder with a
    checkpoint, a GGUF file, or demo, the small model in the package.

    \b
    Examples:
      moe-local chat
      moe-local fit mixtral-8x7b --vram 24GiB
    """
