"""Classes that take the place of a loaded module's own, for a faster way through some of its calls."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


def stand_in(
    cls: Any, make: Callable[[Any], Any], forward: Callable[..., Any], **methods: Callable[..., Any]
) -> Any:
    """A subclass of `cls` with another `forward`, and other `methods`.

    Hooks and `isinstance` find what they look for.

    `make(cls)` has to give it, the same one each time, in a copy's process, too: a module is copied and
    pickled by it, since nobody finds the subclass by its name.
    """

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _empty, (make, cls), self.__dict__

    body = {"forward": forward, **methods, "__module__": cls.__module__, "__reduce_ex__": reduce}
    return type(cls.__name__, (cls,), body)


def _empty(make: Callable[[Any], Any], cls: Any) -> Any:
    made = make(cls)
    return made.__new__(made)


def calling(function: Any, names: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function of plain Python that finds these by their global names, all else as ever."""
    copied = FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def set_class(module: Any, cls: Any) -> None:
    """Make a loaded module one of `cls`, a stand-in for its class or that class again."""
    module.__class__ = cls
    if hasattr(module, "_old_forward"):  # what accelerate's hooks, which move tensors from card to card, call
        module._old_forward = MethodType(cls.forward, module)
