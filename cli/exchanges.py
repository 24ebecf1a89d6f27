"""A conversation that has outgrown the context: without how many of its oldest exchanges it is shown."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain, takewhile
from typing import Any, Generic, NamedTuple, TypeVar

from moe_local.cache.errors import ContextLengthError

ANSWER_SHARE = 4
"""One part in this many of the context is left to the answer, if so much of one is asked for."""
Message = Mapping[str, Any]
T = TypeVar("T")


class Shown(NamedTuple, Generic[T]):
    """What was made of a conversation."""

    prompt: T
    left_out: int
    """Its oldest exchanges that the model is not shown..."""
    earlier: int
    """...of those before the last message of the user."""


def shorten(
    messages: Sequence[Message], make: Callable[[list[Message]], T], fits: Callable[[T], bool]
) -> Shown[T]:
    """What `make` gives for a conversation without as few of its oldest exchanges as needed for it to fit.

    The system prompt and all from the user's last message on are never left out, whether that fits or not.
    A ContextLengthError of `make` says, too, that it does not, and is raised if nothing is left to leave out.
    `make` is called a few times only, as each is a tokenization of the whole.
    """
    system = list(takewhile(lambda message: message["role"] == "system", messages))
    *earlier, last = _exchanges(messages[len(system) :]) or [[]]

    @cache
    def without(oldest: int) -> T:
        return make([*system, *chain.from_iterable(earlier[oldest:]), *last])

    def enough(oldest: int) -> bool:
        try:
            return fits(without(oldest))
        except ContextLengthError:
            return False

    left_out = 0
    if earlier and not enough(0):
        left_out = bisect_left(range(len(earlier)), True, lo=1, key=enough)
    return Shown(without(left_out), left_out, len(earlier))


def answer_room(context: int, most: int) -> int:
    """Tokens of `context` that a long conversation leaves to an answer of `most` tokens at most."""
    return max(1, min(context // ANSWER_SHARE, most))


def _exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    """Pieces that belong together: a user's message with all that follows up to the next one, calls of tools
    and what these gave included."""
    found: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user" or not found:
            found.append([])
        found[-1].append(message)
    return found
