"""Records the arguments of modules in a forward of one token, for trials of other ways to compute them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    version: int | None
    """Of the output when it was returned: torch counts how often a tensor was changed in place. None if it
    is no tensor, or one without a version."""


def token_calls(model: Any, modules: Iterable[nn.Module]) -> dict[nn.Module, Call]:
    """The calls of these modules in a forward of one token, in order of their first calls; the last call of
    each module. Modules that are not called are left out.

    Experts must return something. The tensors are the forward's own; its cache, which then contains the
    token, is among the arguments.
    """
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = Call(args, kwargs, output, version_of(output))

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    return calls


def version_of(value: Any) -> int | None:
    """See Call."""
    return value._version if torch.is_tensor(value) and not value.is_inference() else None
