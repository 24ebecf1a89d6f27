"""Checks before each call of the library that the modules it replaces have not changed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from moe_local.offload.modeling.capturing import all_asleep
from moe_local.offload.modeling.onlooker import Onlooker

_dtype = attrgetter("dtype")

_NOBODY: dict[int, Any] = {}
"""The onlookers of a guard that allows none."""


class Guard:
    """Checks the assumptions of a library call that replaces the calls of several modules.

    There is no notification when a module is replaced, gets a hook, or has its weights moved. So all of that
    is checked before each call, in every layer of every token. To be fast, the checks use the dicts behind
    the modules' attributes, which stay the same objects, since torch looks attributes up in Python.
    """

    def __init__(
        self,
        parent: nn.Module,
        called: Sequence[nn.Module],
        shown: nn.Module | None = None,
        same: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:
        """`called`: the modules whose calls are skipped, and with them their hooks and replaced forwards, so
        they must have none. The only exception are Onlookers on `shown`, one of `called`: the caller of the
        library shows them the input that this module would have been given. The guard checks the weights and
        buffers of `parent` and `called`, that the children of `parent` are the same, and that so are the
        plain attributes `same`, each of a module and with a name."""
        self._families: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (parent._modules, dict(parent._modules))
        ]
        """The children of each parent: as they are, and as they were."""
        self._onlookers: dict[int, Any] = _NOBODY if shown is None else shown._forward_pre_hooks
        self._hooks = [
            hooks
            for part in called
            for hooks in (part._forward_hooks, part._forward_pre_hooks)
            if hooks is not self._onlookers
        ]
        self._own = [vars(part) for part in called]
        self._same = [(vars(part), name, vars(part).get(name)) for part, name in same]
        self._weights = [
            weights.values()
            for part in dict.fromkeys((parent, *called))
            for weights in (part._parameters, *([part._buffers] if part._buffers else ()))
        ]
        self._seen = self._look()

    def __add__(self, other: Guard) -> Guard:
        """One guard in place of two, which is faster to ask; both without onlookers."""
        assert self._onlookers is other._onlookers is _NOBODY
        both = copy(self)
        for name in ("_families", "_hooks", "_own", "_same", "_weights"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        both._seen = [mine + theirs for mine, theirs in zip(self._seen, other._seen, strict=True)]
        return both

    def holds(self) -> bool:
        """Whether the modules are both idle and unchanged."""
        return self.idle() and self.unchanged()

    def idle(self) -> bool:
        """Whether no hook depends on the modules' calls, be it their own or one on all modules, and none of
        them has a forward of its own or is in training, when it may do more."""
        if _global_forward_hooks or _global_forward_pre_hooks:
            return False
        if any(self._hooks) and not all_asleep(self._hooks):
            return False
        for own in self._own:
            if own["training"] or "forward" in own:
                return False
        return all(type(hook) is Onlooker for hook in self._onlookers.values())

    def unchanged(self) -> bool:
        """Whether children, attributes and weights are what they were when the guard was made."""
        for children, kept in self._families:
            if children != kept:
                return False
        for own, name, value in self._same:
            if own.get(name) is not value:
                return False
        return self._look() == self._seen

    def _look(self) -> list[list[Any]]:
        """Address, dtype and size of each weight: the address alone is not enough, since freed memory may be
        reused for other numbers."""
        weights = [weight for some in self._weights for weight in some if weight is not None]
        looks = Tensor.data_ptr, _dtype, Tensor.numel
        return [list(map(look, weights)) for look in looks]
