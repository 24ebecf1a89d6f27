"""The flags that commands share: those for loading, made from LoadOptions' fields, and those for sampling.

Every flag has a MOE_LOCAL_* variable. Values are checked by the same code as in the Python API, so the error
messages are the same: sampling flags at once, others when they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from moe_local.cache.files import parse_json
from moe_local.cli.text_file import read_text_file
from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.chat_template import check_chat_template
from moe_local.offload.options import LoadOptions
from moe_local.offload.ranges import RANGES, check_range

Command = Callable[..., Any]

LOAD_FLAGS = (
    *("vram", "ram", "slots", "experts", "dense", "context", "policy", "prefetch", "miss", "device"),
)
"""Fields of LoadOptions that are flags, in the order of the help."""
CHAT_FLAGS = (*LOAD_FLAGS, "chat_template")
"""Those of commands that talk."""

METAVARS = {
    "vram": "SIZE",
    "ram": "SIZE",
    "slots": "N",
    "context": "TOKENS",
    "parallel": "N",
    "device": "NAME",
    "chat_template": "FILE",
}
TYPES: dict[str, Any] = {
    "slots": int,
    "context": int,
    "parallel": int,
    "chat_template": click.Path(exists=True, dir_okay=False, path_type=Path),
}
"""Of flags that are not text."""
SHORT = {"context": "-c"}
RANGED = {"max_tokens": "max_new_tokens"}
"""Settings that the Python API calls by another name."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings for an answer; None leaves one to the checkpoint's generation_config."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    system: str | None = None
    think: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""

    def check(self, *, flags: bool = False) -> None:
        """Raise OptionError for a value out of range. `flags`: name the values as flags in the error."""
        for field in fields(self):
            name = RANGED.get(field.name, field.name)
            if name in RANGES:
                called = f"--{field.name.replace('_', '-')}" if flags else field.name
                check_range(name, getattr(self, field.name), called=called)

    def generation(self) -> dict[str, Any]:
        """The keyword arguments for Model.stream and Model.generate."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            RANGED["max_tokens"]: self.max_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}

    def template(self, answers: AnswerFormat) -> dict[str, Any]:
        """Further keyword arguments, for the chat template of a model. Raises OptionError if that has no
        switch for thoughts."""
        variables = template_variables(answers, self.think, self.chat_template_kwargs)
        return {"chat_template_kwargs": variables} if variables else {}

    def conversation(self) -> list[dict[str, str]]:
        """The messages a conversation begins with: the system prompt, if there is one."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]


class WholeNumber(click.IntRange):
    """click's, but a value that is no number "is not a valid whole number", not "integer range"."""

    name = "whole number"

    def get_metavar(self, *_: object, **__: object) -> str:
        return "N"


def load_flags(*names: str) -> Callable[[Command], Command]:
    """Add flags for these fields of LoadOptions, by default those in LOAD_FLAGS.

    The command gets one argument `options`, a dict for `load(**options)` of the flags that were given.
    """
    wanted = names or LOAD_FLAGS

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def collect(*args: Any, **kwargs: Any) -> Any:
            values = {name: kwargs.pop(name) for name in wanted}
            options = {name: value for name, value in values.items() if value is not None}
            return command(*args, options=options, **kwargs)

        known = {field.name: field for field in fields(LoadOptions)}
        for name in reversed(wanted):
            field = known[name]
            collect = click.option(
                *([SHORT[name]] if name in SHORT else []),
                f"--{name.replace('_', '-')}",
                type=TYPES.get(name, str),
                callback=_template if name == "chat_template" else None,
                metavar=METAVARS.get(name, "NAME"),
                envvar=f"MOE_LOCAL_{name.upper()}",
                show_envvar=True,
                help=field.metadata["help"],
            )(collect)
        return collect

    return decorate


def _template(ctx: click.Context, param: click.Parameter, value: Path | None) -> str | None:
    """The text of a chat template, in a file."""
    if value is None or ctx.resilient_parsing:
        return None
    return check_chat_template(read_text_file(value, "the chat template", "give one in Jinja"), str(value))


def sampling_flags(command: Command) -> Command:
    """Add the sampling flags; the command gets one argument `sampling`, a Sampling."""

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> Any:
        sampling = Sampling(**{field.name: kwargs.pop(field.name) for field in fields(Sampling)})
        sampling.check(flags=True)
        return command(*args, sampling=sampling, **kwargs)

    collect = template_flags(call)
    for flags, kind, text in reversed(_SAMPLING):
        name = flags[-1].removeprefix("--").replace("-", "_")
        collect = click.option(
            *flags, type=kind, envvar=f"MOE_LOCAL_{name.upper()}", show_envvar=True, help=text
        )(collect)
    return collect


_SAMPLING: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("--temperature",), float, "Randomness: 0 always takes the likeliest token, 1 is the model's own."),
    (("--top-p",), float, "Sample from the likeliest tokens that make up this share."),
    (("--top-k",), int, "Sample from this many of the likeliest tokens."),
    (("--min-p",), float, "Sample from tokens at least this likely, relative to the likeliest."),
    (("-s", "--seed"), int, "Make sampling repeatable."),
    (("-n", "--max-tokens"), int, "Most tokens of an answer; 512 by default."),
    (("--system",), str, "System prompt."),
)


def template_flags(command: Command) -> Command:
    """Add flags for the chat template; the command gets `think` and `chat_template_kwargs`."""
    command = click.option(
        "--chat-template-kwargs",
        callback=_variables,
        metavar="JSON",
        envvar="MOE_LOCAL_CHAT_TEMPLATE_KWARGS",
        show_envvar=True,
        help='Further variables of the chat template, such as {"reasoning_effort": "low"}.',
    )(command)
    return click.option(
        "--think/--no-think",
        default=None,
        envvar="MOE_LOCAL_THINK",
        show_envvar=True,
        help="Turn thoughts on or off, where the chat template can; else it is the model's own choice.",
    )(command)


def template_variables(
    answers: AnswerFormat, think: bool | None, others: dict[str, Any] | None
) -> dict[str, Any]:
    """What the flags for the chat template amount to. Raises OptionError if it has no switch for thoughts."""
    return {**({} if think is None else answers.thinking(think)), **(others or {})}


def _variables(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """An object of JSON."""
    if value is None:
        return None
    try:
        found = parse_json(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}", ctx, param) from None
    if not isinstance(found, dict):
        raise click.BadParameter(
            f'{value!r} is no object of JSON, such as {{"enable_thinking": false}}', ctx, param
        )
    return found


def json_flag(command: Command) -> Command:
    """Add --json; the command gets `as_json`."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON document on stdout, and everything else on stderr.",
    )(command)


def debug_flag(command: Command) -> Command:
    """Add --debug, which `main.MoeLocal` reads when it reports an error."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.find_root().command.debug = True  # type: ignore[attr-defined]

    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        envvar="MOE_LOCAL_DEBUG",
        show_envvar=True,
        help="On an error, show the trace.",
    )(command)
