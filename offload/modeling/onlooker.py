"""Hooks that only read a module's input, and so can be called even where the module itself is bypassed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Onlooker:
    """A forward pre-hook that gets the first argument of a module's call, and changes nothing.

    Torch calls it as any hook. Code that computes a layer without calling the module recognizes the hook by
    its class, and calls it with the tensor that the module would have been given. Other hooks make such code
    fall back to calling the modules.
    """

    def __init__(self, look: Callable[[torch.Tensor], None]) -> None:
        """`look` may keep the tensor, and must not write to it."""
        self._look = look

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._look(args[0])
