"""A conversation that has outgrown the context: how many of its oldest exchanges the model is not shown."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any

ANSWER_SHARE = 4
"""One part in this many of the context is left to the answer, if so much of one is asked for."""


def exchanges(turns: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Messages without the system prompt, in pieces that belong together: a user's, with all that follows up
    to the next of them, which may be calls of tools and what these gave."""
    found: list[list[Mapping[str, Any]]] = []
    for turn in turns:
        if turn["role"] == "user" or not found:
            found.append([])
        found[-1].append(turn)
    return found


def answer_room(context: int, most: int) -> int:
    """Tokens of `context` that a long conversation leaves to an answer of `most` tokens at most."""
    return max(1, min(context // ANSWER_SHARE, most))


def least_left_out(earlier: int, fits: Callable[[int], bool]) -> int:
    """How many of `earlier` exchanges to leave out, as few as make it fit; all of them if nothing does.

    `fits(n)`: whether the conversation without its n oldest ones does. It is asked a few times only, since an
    answer costs a tokenization of the whole.
    """
    if earlier == 0 or fits(0):
        return 0
    return bisect_left(range(earlier), True, lo=1, key=fits)
