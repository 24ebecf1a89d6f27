"""The flags of `moe-local bench`, in addition to those for loading a model."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cli.plot import check_plotting

Command = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure, and where to write the figures. Each field is the flag of the same name."""

    synthetic: str | None
    layers: int | None
    workload: str
    tokens: int
    prompt_tokens: int
    batch: int
    repeats: int
    compare: bool
    routes: Path | None
    record_routes: Path | None
    plot: Path | None
    watch: bool

    def check(self, model: str | None) -> None:
        """Raise errors now that would otherwise appear only after minutes."""
        if (model is None) == (self.synthetic is None):
            raise click.UsageError("give either MODEL or --synthetic NAME")
        if self.layers is not None and self.synthetic is None:
            raise click.UsageError(
                f"--layers {self.layers} is of a synthetic model only; add --synthetic NAME"
            )
        for name, least in (("tokens", 2), ("prompt_tokens", 1), ("batch", 1), ("repeats", 1)):
            value = getattr(self, name)
            if value < least:
                flag = name.replace("_", "-")
                raise OptionError(f"--{flag} {value} measures nothing; use {least} or more")
        for path in filter(None, (self.record_routes, self.plot)):
            _check_writable(path)
        if self.plot is not None:
            check_plotting(self.plot)
        if self.watch and not sys.stderr.isatty():
            raise OptionError("--watch draws on a terminal, and stderr is not one; leave it out")
        if self.routes is not None and self.record_routes is not None:
            raise OptionError(
                "--record-routes has nothing to record where --routes chooses; leave one of them out"
            )


def _check_writable(path: Path) -> None:
    """Raise MoeLocalError if it is clear already that this file cannot be written after the measurement."""
    if path.is_dir():
        raise OptionError(f"{path} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise OptionError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise MoeLocalError(f"cannot write {path}: the folder {path.parent} is read-only; name another file")


def bench_flags(command: Command) -> Command:
    """Add the flags; the command gets them as one argument `request`."""

    @functools.wraps(command)
    def collect(*args: Any, **kwargs: Any) -> Any:
        request = Request(**{field.name: kwargs.pop(field.name) for field in fields(Request)})
        return command(*args, request=request, **kwargs)

    for name, settings in reversed(_FLAGS):
        parameter = name.removeprefix("--").replace("-", "_")
        if not settings.get("is_flag"):
            settings = {"envvar": f"MOE_LOCAL_{parameter.upper()}", "show_envvar": True, **settings}
            settings["show_default"] = settings.get("default") is not None
        collect = click.option(name, **settings)(collect)
    return collect


_FILE = click.Path(path_type=Path)
_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--synthetic",
        {
            "metavar": "NAME",
            "help": "Made weights in the shape of a published model instead: mixtral-8x7b, qwen3-30b-a3b, "
            "qwen3-next-80b-a3b, qwen3.6-35b-a3b, glm-4.7-flash, gpt-oss-120b, deepseek-v3, "
            "nemotron-3-nano-30b-a3b or lfm2-8b-a1b.",
        },
    ),
    (
        "--layers",
        {"type": int, "metavar": "N", "help": "Layers of the synthetic model; by default as many as fit."},
    ),
    (
        "--workload",
        {
            "metavar": "NAMES",
            "default": "single,chat,long,batch",
            "help": "What to measure, the main one first.",
        },
    ),
    ("--tokens", {"type": int, "metavar": "N", "default": 32, "help": "New tokens of each answer."}),
    ("--prompt-tokens", {"type": int, "metavar": "N", "default": 512, "help": "Tokens of the long prompt."}),
    ("--batch", {"type": int, "metavar": "N", "default": 4, "help": "Prompts of the batch."}),
    (
        "--repeats",
        {
            "type": int,
            "metavar": "N",
            "default": 6,
            "help": "Timed runs of each workload, after one that warms up; intervals need 6.",
        },
    ),
    (
        "--compare",
        {
            "is_flag": True,
            "help": "Also measure the main workload without cache, without prefetch, and with each policy "
            "and each way to handle misses, all in turn.",
        },
    ),
    ("--routes", {"type": _FILE, "metavar": "FILE", "help": "Let this recording choose the experts."}),
    (
        "--record-routes",
        {"type": _FILE, "metavar": "FILE", "help": "Write what the routers chose to this file."},
    ),
    ("--plot", {"type": _FILE, "metavar": "FILE.png", "help": "Draw the figures (needs matplotlib)."}),
    ("--watch", {"is_flag": True, "help": "Show the cache and the stalls while tokens come."}),
)
