"""From a request to its answer: prompts into the batcher, tokens out of it, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from moe_local.cli.server.logprobs import Echo, Entries
from moe_local.cli.server.text import StopFilter
from moe_local.offload.answer_format.piece import Parser, Piece, tool_call
from moe_local.offload.batcher import Ended, Ticket
from moe_local.offload.records import Token


@dataclass(slots=True)
class Choice:
    """One answer of a request, as its tokens arrive in the event loop."""

    index: int
    stops: StopFilter
    parser: Parser
    again: bool = False
    """Whether its prompt is one that an earlier choice has, too: usage counts a prompt once."""
    echo: Echo | None = None
    """The prompt that it begins with; None: with none."""
    mute: bool = False
    """Whether nothing is to follow that: the one token that is computed all the same is dropped."""
    room: int | None = None
    """How many tokens the context has room for; None: at least as many as were asked for."""
    ticket: Ticket | None = None
    tokens: int = 0
    thoughts: int = 0
    """How many of the tokens are thoughts, with the marks around them; those that come first."""
    spoken: bool = False
    """Whether anything else has come."""
    calls: int = 0
    finish_reason: str | None = None
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    entries: Entries = field(default_factory=Entries)
    """Log probabilities that have not been sent; without any where none were asked for."""

    def take(self, event: Token | Ended) -> list[Piece]:
        """What a token, or the end, adds. Raises the error that ended it."""
        pieces: list[Piece] = []
        if isinstance(event, Token):
            self._begin(event)
            if self.mute:
                return pieces
            self.tokens += 1
            shown = self.stops.add(event.text)
            self.entries.add(event, shown)
            pieces += self.parser.add(shown)
            self.spoken |= any(piece.content or piece.call for piece in pieces)
            if not self.spoken and (self.parser.thinking or any(piece.reasoning for piece in pieces)):
                self.thoughts = self.tokens
            if self._ended_early and self.finish_reason is None:
                self._finish("stop", pieces)
                if self.ticket is not None:
                    self.ticket.cancel()
            return pieces
        if self.finish_reason is None:
            if event.error is not None:
                raise event.error
            pieces += self.parser.add(self.stops.flush())
            self._finish("length" if self.mute else str(event.reason or "stop"), pieces)
        return pieces

    def _begin(self, token: Token) -> None:
        """With the first token come the log probabilities of the prompt, where any were asked for."""
        if self.tokens or token.logprob is None or self.echo is None or self.ticket is None:
            return
        self.entries.begin(self.echo, self.ticket.prompt_logprobs)

    def keep(self, piece: Piece, call_id: str = "") -> None:
        """Collect a piece for an answer that is given whole. `call_id`: for a call."""
        if piece.call is not None:
            self.tool_calls.append(tool_call(piece.call, call_id))
        elif piece.reasoning:
            self.reasoning.append(piece.reasoning)
        else:
            self.content.append(piece.content)

    @property
    def _ended_early(self) -> bool:
        """Whether nothing that may follow will be shown."""
        return self.stops.stopped or self.parser.done

    def _finish(self, reason: str, pieces: list[Piece]) -> None:
        pieces += self.parser.flush(cut=reason == "length" or self.stops.stopped)
        self.entries.end(cut=self._ended_early)
        self.finish_reason = reason

    @property
    def filled_context(self) -> bool:
        """Whether only a larger context would have let it go on."""
        return self.finish_reason == "length" and self.room is not None and self.tokens >= self.room

    def reason(self) -> str:
        """OpenAI's word for why it ended."""
        if self.finish_reason == "stop" and self.calls:
            return "tool_calls"
        return self.finish_reason or "stop"


class Answer:
    """All choices of one request. Lives in the event loop; tokens come from the batcher's thread.

    A context manager: whatever is still under way when it is left is cancelled.
    """

    def __init__(self, kind: str, model: str, call_id: Callable[[], str]) -> None:
        """`kind`: the prefix of its id, "chatcmpl-", "cmpl-", "resp_" or "msg_". `call_id` makes an id for a
        call."""
        self.id = f"{kind}{uuid.uuid4().hex[:24]}"
        self.created = int(time.time())
        self.model = model
        self.call_id = call_id
        self.choices: list[Choice] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.left_out = 0
        """Oldest exchanges that are not in the prompt."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[Choice, Token | Ended]] = asyncio.Queue()

    def add(self, choice: Choice) -> Choice:
        self.choices.append(choice)
        return choice

    def listener(self, choice: Choice) -> Any:
        """For Batcher.submit."""

        def listen(event: Token | Ended) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

        return listen

    def started(self, choice: Choice, ticket: Ticket) -> None:
        choice.ticket = ticket
        if not choice.again:
            self.prompt_tokens += len(ticket.prompt_ids)

    async def events(
        self, silence_s: float | None = None
    ) -> AsyncIterator[tuple[Choice, list[Piece], Token | Ended | None]]:
        """Each choice's pieces as they come, until all have ended. Raises what ended one with an error.

        Without any event for `silence_s` seconds there comes a None, and no pieces.
        """
        open_choices = len(self.choices)
        while open_choices:
            try:
                async with asyncio.timeout(silence_s):
                    choice, event = await self._events.get()
            except TimeoutError:
                yield self.choices[0], [], None
                continue
            if isinstance(event, Ended):
                open_choices -= 1
                if choice.ticket is not None and not choice.again:
                    self.cached_tokens += choice.ticket.reused_tokens
            yield choice, choice.take(event), event

    @property
    def reasoning_tokens(self) -> int:
        return sum(choice.thoughts for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        new = sum(choice.tokens for choice in self.choices)
        left_out = {"left_out_exchanges": self.left_out} if self.left_out else {}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, **left_out},
        }

    def cancel(self) -> None:
        """Stop computing whatever is still under way. Idempotent."""
        for choice in self.choices:
            if choice.ticket is not None:
                choice.ticket.cancel()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()
