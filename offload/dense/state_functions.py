"""Layers with a state whose forward, transformers' own, calls functions by name: others in their place.

The others overwrite states in CPU memory, so calls that ask for more than that keep transformers' functions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from moe_local.offload.modeling.names import cache_name
from moe_local.offload.modeling.stand_in import calling, stand_in
from moe_local.offload.native.library import library

Function = Callable[..., Any]


def use_functions(
    model: nn.Module,
    names: Sequence[str],
    agrees: Callable[[list[Function]], bool],
    native: Callable[[Any], Any],
    suits: Callable[[nn.Module], bool] = lambda module: True,
) -> None:
    """Give the layers of `model` whose forwards call functions by these names, and that suit, the class that
    `native` makes of theirs, if the functions agree with the library's. Each class is tried once."""
    if library() is None:
        return
    agreed: dict[Any, bool] = {}
    for module in model.modules():
        cls: Any = type(module)
        if cls not in agreed:
            functions = functions_called(cls, names)
            agreed[cls] = functions is not None and agrees(functions)
        if agreed[cls] and suits(module):
            module.__class__ = native(cls)


def functions_called(cls: Any, names: Sequence[str]) -> list[Function] | None:
    """The functions that the forward of a class calls by these names; None if it does not call them all."""
    plain = inspect.unwrap(cls.forward)
    code = getattr(plain, "__code__", None)
    if code is None or not set(names) <= set(code.co_names):
        return None
    functions: list[Any] = [plain.__globals__.get(name) for name in names]
    return functions if all(callable(function) for function in functions) else None


def with_functions(cls: Any, make: Callable[[Any], Any], functions: dict[str, Function]) -> Any:
    """A subclass of a class of layers whose forward calls these functions, by name; see `stand_in` for
    `make`."""
    direct, name = calling(inspect.unwrap(cls.forward), functions), cache_name(cls.forward)

    @functools.wraps(cls.forward)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        memory = kwargs.get(name)
        if (
            memory is None
            or hidden_states.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or memory.layers[self.layer_idx].record_past  # wants states that are overwritten here
        ):
            return cls.forward(self, hidden_states, *args, **kwargs)
        return direct(self, hidden_states, *args, **kwargs)

    return stand_in(cls, make, forward)


def refuse(*args: Any, **options: Any) -> Any:
    """In place of a function that a trial of ours must not fall back on."""
    raise RuntimeError("the library does not do this")
