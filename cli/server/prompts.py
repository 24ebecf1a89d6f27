"""From what requests hold to the token ids of their prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import moe_local
from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cli.exchanges import Shown, answer_room, shorten
from moe_local.cli.server.logprobs import Echo
from moe_local.cli.server.protocol import ChatRequest
from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.engine.text import encode_prompt

LONG_PROMPT = 1 << 16
"""Characters of a prompt that others need not wait for."""
T = TypeVar("T")


class Prompts:
    """Makes prompts beside the event loop: a megabyte takes a second, in which short ones pass by.

    Each method raises OptionError for what no prompt can be made of.
    """

    def __init__(
        self,
        model: moe_local.Model,
        answers: AnswerFormat,
        most_tokens: int | None,
        variables: Mapping[str, Any],
    ) -> None:
        """`answers`: how the model writes them. `most_tokens`: of one that asks for no number; None: what the
        context holds. `variables`: of the chat template, for requests that do not give them."""
        self._model = model
        self._answers = answers
        self._most_tokens = most_tokens
        self._variables = variables
        self._encoding = {False: asyncio.Lock(), True: asyncio.Lock()}
        """By whether the prompt is a long one."""

    async def conversation(self, asked: ChatRequest) -> Shown[list[int]]:
        """Token ids of a conversation, and what of it was left out."""
        tools, messages = asked.offered_tools, asked.conversation()
        form = asked.form(self._answers)
        context = self._model.plan.request.context
        room = answer_room(context, asked.most_tokens or self._most_tokens or context)

        def encode(shown: Sequence[Mapping[str, Any]]) -> list[int]:
            return encode_prompt(
                self._model.tokenizer,
                shown,
                tools=tools,
                variables={**self._variables, **asked.template_variables},
                answers=self._answers,
            )

        def make() -> Shown[list[int]]:
            if asked.truncation == "auto":
                return shorten(messages, encode, lambda ids: len(ids) + room <= context)
            return Shown(encode(messages), 0, 0)

        shown = await self._beside(make, sum(len(message["content"] or "") for message in messages))
        if form:
            await self._beside(lambda: self._model.check_form(form, shown.prompt), 0)
        return shown

    async def text(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a text to be continued."""
        return await self._beside(
            lambda: encode_prompt(self._model.tokenizer, prompt, template=False),
            len(prompt) if isinstance(prompt, str) else 0,
        )

    async def echo(self, prompt: list[int]) -> Echo:
        return await self._beside(lambda: Echo.of(self._model.tokenizer, prompt), len(prompt))

    async def _beside(self, make: Callable[[], T], characters: int) -> T:
        async with self._encoding[characters > LONG_PROMPT]:
            try:
                return await asyncio.to_thread(make)
            except MoeLocalError:
                raise
            except Exception as error:  # of a template or a tokenizer that was given what it never expected
                raise OptionError(
                    f"no prompt can be made of this: {type(error).__name__}: {error}"
                ) from error
