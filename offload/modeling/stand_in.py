"""Subclasses that replace the class of a loaded module, for a faster computation of some of its calls."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any


def stand_in(
    cls: Any, make: Callable[[Any], Any], forward: Callable[..., Any], **methods: Callable[..., Any]
) -> Any:
    """A subclass of `cls` with another `forward`, and other `methods`.

    Hooks and `isinstance` work as with `cls`.

    `make(cls)` must return this subclass, the same one at each call, also in a process that unpickles a copy:
    modules are copied and pickled by means of it, since the subclass cannot be imported by name.
    """

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _empty, (make, cls), self.__dict__

    body = {"forward": forward, **methods, "__module__": cls.__module__, "__reduce_ex__": reduce}
    return type(cls.__name__, (cls,), body)


def _empty(make: Callable[[Any], Any], cls: Any) -> Any:
    made = make(cls)
    return made.__new__(made)


def calling(function: Any, names: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a plain Python function in which the global `names` have these values."""
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
    """Set the class of a loaded module to `cls`: a stand-in for its class, or the original class again."""
    module.__class__ = cls
    if hasattr(module, "_old_forward"):  # which accelerate's hooks, for several cards, call
        module._old_forward = MethodType(cls.forward, module)
