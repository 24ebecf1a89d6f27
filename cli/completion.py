"""Shell completion: `moe-local completion SHELL`, and the model names that complete MODEL.

Runs at every press of Tab, so nothing here imports torch, transformers or the Hub library's client.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from moe_local.cache.files import parse_json

PROGRAM = "moe-local"
VARIABLE = "_MOE_LOCAL_COMPLETE"
"""The environment variable by which a shell requests completions; click derives it from the program's
name."""

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands, flags and models in SHELL.

    Keep it where the shell looks for such scripts; for zsh that folder has to be in fpath.

    \b
    Examples:
      moe-local completion bash > ~/.local/share/bash-completion/completions/moe-local
      moe-local completion zsh > ~/.zfunc/_moe-local
      moe-local completion fish > ~/.config/fish/completions/moe-local.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(click.get_current_context().find_root().command, {}, PROGRAM, VARIABLE).source())


def model_argument(**settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument MODEL, completed with model names, or with files if no name matches."""
    return click.argument("model", shell_complete=complete_model, **settings)


def complete_model(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The demo, aliases and downloaded models that begin with `incomplete`; if none does, files."""
    found = [name for name in model_names() if name.lower().startswith(incomplete.lower())]
    return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]


def model_names() -> Iterator[str]:
    """The demo, every alias, and Mixture-of-Experts models in the Hub cache that have no alias."""
    from moe_local.offload.checkpoint.registry import ALIASES, DEMO

    yield DEMO
    yield from ALIASES
    aliased = {entry.repo_id.lower() for entry in ALIASES.values()}
    yield from (repo_id for repo_id in _downloaded() if repo_id.lower() not in aliased)


def _downloaded() -> list[str]:
    """Ids of models in the Hub cache, including unfinished downloads, whose config mentions experts. Reads
    only file names and configs."""
    from huggingface_hub import constants

    found = []
    for config in Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*/config.json"):
        if speaks_of_experts(config):
            found.append(config.parents[2].name.removeprefix("models--").replace("--", "/", 1))
    return sorted({*found})


def speaks_of_experts(config: Path) -> bool:
    """Whether a config.json seems to be that of a Mixture-of-Experts model, by the names of its fields."""
    try:
        fields = parse_json(config.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and "expert" in json.dumps([*fields, fields.get("text_config")])
