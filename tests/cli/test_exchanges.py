"""What of a conversation a model is shown whose context does not hold all of it."""

from __future__ import annotations

from typing import Any

import pytest

from moe_local.cache.errors import ContextLengthError
from moe_local.cli.exchanges import Shown, answer_room, shorten


def said(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles)]


class Prompts:
    """Of a token a message; those of more than `context` are refused, those of more than `most` too long."""

    def __init__(self, context: int, most: int) -> None:
        self.context, self.most = context, most
        self.made: list[int] = []

    def make(self, messages: list[Any]) -> list[str]:
        self.made.append(len(messages))
        if len(messages) > self.context:
            raise ContextLengthError(f"{len(messages)} tokens")
        return [message["content"] for message in messages]

    def fits(self, prompt: list[str]) -> bool:
        return len(prompt) <= self.most

    def of(self, messages: list[Any]) -> Shown[list[str]]:
        return shorten(messages, self.make, self.fits)


def test_what_fits_is_made_once() -> None:
    prompts, talk = Prompts(9, 5), said("system", "user", "assistant", "user", "assistant")
    assert prompts.of(talk) == ([message["content"] for message in talk], 0, 1)
    assert prompts.made == [5]


@pytest.mark.parametrize("most", [2, 3, 8, 31, 79])
def test_as_few_as_needed_are_left_out_and_few_are_made(most: int) -> None:
    for earlier in range(40):
        prompts = Prompts(most + 10, most)
        shown = prompts.of(said("system", *("user", "assistant") * earlier, "user"))
        kept = min(earlier, (most - 2) // 2)
        assert shown[1:] == (earlier - kept, earlier)
        assert [text.split()[0] for text in shown.prompt] == ["system", *("user", "assistant") * kept, "user"]
        assert shown.prompt[-1] == f"user {2 * earlier + 1}", "the latest stay"
        assert len(prompts.made) <= 8


def test_what_tools_were_asked_and_gave_stays_with_its_question() -> None:
    one = ("user", "assistant", "tool", "tool", "assistant")
    shown = Prompts(99, 9).of(said("system", "system", *one, *one, "user", "assistant", "tool"))
    assert [text.split()[0] for text in shown.prompt] == ["system", "system", "user", "assistant", "tool"]
    assert shown.left_out == shown.earlier == 2
    assert Prompts(99, 10).of(said("system", "system", *one, *one, "user", "assistant", "tool")).left_out == 1


def test_the_last_message_is_shown_or_refused_by_itself() -> None:
    talk = said("user", "assistant", "user", "assistant", "user")
    assert Prompts(1, 0).of(talk) == (["user 4"], 2, 2), "with less room than there should be"
    with pytest.raises(ContextLengthError, match="1 tokens"):
        Prompts(0, 0).of(talk)


def test_conversations_that_begin_or_end_otherwise() -> None:
    assert Prompts(9, 9).of(said("system")) == (["system 0"], 0, 0)
    assert Prompts(9, 1).of(said("assistant", "user")) == (["user 1"], 1, 1)


@pytest.mark.parametrize(("context", "most", "room"), [(4096, 512, 512), (1024, 512, 256), (2, 9, 1)])
def test_room_for_an_answer(context: int, most: int, room: int) -> None:
    assert answer_room(context, most) == room
