"""Classes that take the place of a loaded module's own, for a faster way through some of its calls."""

from __future__ import annotations

from collections.abc import Callable
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
