"""Hooks that only look, and so can be served by whoever computes a module's answer without calling it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Onlooker:
    """A forward pre-hook that is shown the first tensor a module is called with, and changes nothing.

    Torch calls it with the module, as any hook. A layer that runs without calling the module knows it by its
    class, and calls it with the tensor that the module would have been given, where other hooks send the
    layer the plain way.
    """

    def __init__(self, look: Callable[[torch.Tensor], None]) -> None:
        """`look` may keep the tensor, and must not write to it."""
        self._look = look

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._look(args[0])
