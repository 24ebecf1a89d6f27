"""What trials of other ways to compute modules need: the arguments of a forward of one token, comparisons."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

DRAWS = 4
"""Most random inputs of one size that a module is tried with; one that agrees is enough. With large numbers
rounding to 16 bits may decide on much, such as which of two close positions a softmax picks. A module that
differs in more than that never agrees."""


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


def attempt(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What the module returns, without gradients; None if it does not take such arguments."""
    try:
        with torch.no_grad():
            return module(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def version_of(value: Any) -> int | None:
    """See Call."""
    return value._version if torch.is_tensor(value) and not value.is_inference() else None


def agrees_on_sizes(agrees_at: Callable[[float], bool]) -> bool:
    """Whether a trial with random inputs agrees on small and on large numbers, which reveal clamping."""
    return all(any(agrees_at(size) for _ in range(DRAWS)) for size in (0.05, 1.0, 40.0))


def all_close(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], activations: str) -> bool:
    """Whether what the library gave is what the module did, up to rounding; each pair in this order.
    `activations` as in QuantizedLinear."""
    return all(got.shape == wanted.shape and _close(got, wanted, activations) for got, wanted in pairs)


def _close(got: torch.Tensor, wanted: torch.Tensor, activations: str) -> bool:
    allowed = 0.1 if activations == "int8" else {torch.float32: 1e-4}.get(wanted.dtype, 0.03)
    off = (got.float() - wanted.float()).norm()
    return bool(off <= allowed * wanted.float().norm())
