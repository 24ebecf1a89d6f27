"""Shortening a conversation that has outgrown the context, by leaving out its oldest exchanges."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain, takewhile
from typing import Any, Generic, NamedTuple, TypeVar

from moe_local.cache.errors import ContextLengthError

ANSWER_SHARE = 4
"""1 / ANSWER_SHARE of the context is reserved for the answer, or less if a shorter answer is asked for."""
Message = Mapping[str, Any]
T = TypeVar("T")


class Shown(NamedTuple, Generic[T]):
    """A conversation that may have been shortened."""

    prompt: T
    left_out: int
    """How many of the oldest exchanges were left out."""
    earlier: int
    """How many exchanges there are, left out or not, before the user's last message."""


def shorten(
    messages: Sequence[Message], make: Callable[[list[Message]], T], fits: Callable[[T], bool]
) -> Shown[T]:
    """Call `make` on a conversation without its oldest exchanges, as few as needed for the result to fit.

    The system prompt and everything from the user's last message on are never left out, even if they do not
    fit. A ContextLengthError from `make` also means that a conversation does not fit; it is raised if no
    more can be left out. `make` is called only a few times, since each call tokenizes the conversation.
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
    """Tokens of `context` that are reserved for an answer of at most `most` tokens."""
    return max(1, min(context // ANSWER_SHARE, most))


def _exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    """Split into exchanges: each is a user's message with everything up to the next one, including tool calls
    and their results."""
    found: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user" or not found:
            found.append([])
        found[-1].append(message)
    return found
