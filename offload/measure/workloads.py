"""The workloads of measurements: a single answer, a conversation, a long prompt, a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.offload.measure.prompts import Conversation, long_prompt, questions
from moe_local.offload.measure.sample import Taker

TURNS = 4
"""Questions of a conversation: two topics, each with a follow-up."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of work. `run(taker, tokenizer, number)` does it; equal numbers give equal prompts."""

    name: str
    summary: str
    run: Callable[[Taker, Any, int], None]


def _single(taker: Taker, tokenizer: Any, number: int) -> None:
    taker.answer(Conversation(tokenizer).ask(questions(number, 1)[0]))


def _chat(taker: Taker, tokenizer: Any, number: int) -> None:
    conversation = Conversation(tokenizer)
    for question in questions(number, TURNS):
        text = taker.answer(conversation.ask(question))
        conversation.answered(text, taker.sample.ids[-1])


def _long(prompt_tokens: int) -> Callable[[Taker, Any, int], None]:
    def run(taker: Taker, tokenizer: Any, number: int) -> None:
        taker.answer(long_prompt(tokenizer, number, prompt_tokens))

    return run


def _batch(rows: int) -> Callable[[Taker, Any, int], None]:
    def run(taker: Taker, tokenizer: Any, number: int) -> None:
        asked = [questions(rows * number + row, 1)[0] for row in range(rows)]
        taker.answer_together([Conversation(tokenizer).ask(question) for question in asked])

    return run


def workloads(prompt_tokens: int, batch: int) -> dict[str, Workload]:
    """Name -> workload, with `prompt_tokens` tokens in the long prompt and `batch` prompts at once."""
    return {
        "single": Workload("single", "one question", _single),
        "chat": Workload("chat", f"a conversation of {TURNS} questions on {TURNS // 2} topics", _chat),
        "long": Workload("long", f"a prompt of {prompt_tokens} tokens", _long(prompt_tokens)),
        "batch": Workload("batch", f"{batch} questions at once", _batch(batch)),
    }


def choose(names: str, prompt_tokens: int, batch: int) -> list[Workload]:
    """The workloads in "single,chat" or the like, the main one first. Raises OptionError for other names."""
    known = workloads(prompt_tokens, batch)
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise OptionError(f"unknown workload {name!r}; use some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(chosen)]
