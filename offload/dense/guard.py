"""Whether modules are still what a call of the library was made for, looked at before each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moe_local.offload.modeling.onlooker import Onlooker


class Guard:
    """What a call of the library relies on that takes the place of several modules' calls.

    Nobody says when a module is replaced, gets a hook, or has its weights moved. So all of that is looked at
    before each call, in every layer of every token: not by the modules' attributes, which torch looks up in
    Python, but in the dicts behind them, which stay.
    """

    def __init__(
        self, parent: nn.Module, called: Sequence[nn.Module], shown: nn.Module | None = None
    ) -> None:
        """`called`: the modules whose calls are not made; hooks and forwards of their own would not be
        called either. Only the Onlookers of `shown`, one of them, may be there: who makes the call shows them
        what that module would have been given. Weights are watched of these and of `parent`, and which
        children `parent` has."""
        self._children: dict[str, Any] = parent._modules
        self._kept = dict(self._children)
        self._onlookers: dict[int, Any] = {} if shown is None else shown._forward_pre_hooks
        self._hooks = [
            hooks
            for part in called
            for hooks in (part._forward_hooks, part._forward_pre_hooks)
            if hooks is not self._onlookers
        ]
        self._own = [vars(part) for part in called]
        self._weights = [part._parameters.values() for part in (parent, *called)]
        self._seen = self._look()

    def holds(self) -> bool:
        """Whether all is as it was when the guard was made, and nothing sees the modules' calls."""
        if any(self._hooks) or self._children != self._kept:
            return False
        for hook in self._onlookers.values():
            if type(hook) is not Onlooker:
                return False
        for own in self._own:
            if "forward" in own:
                return False
        return self._look() == self._seen

    def _look(self) -> list[Any]:
        """Memory that is freed may be given out again, for other numbers: an address does not say it all."""
        return [
            (weight.data_ptr(), weight.dtype, weight.numel())
            for weights in self._weights
            for weight in weights
            if weight is not None
        ]
