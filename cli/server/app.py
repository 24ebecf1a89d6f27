"""The HTTP server's routes, on FastAPI: OpenAI's and Anthropic's, health, metrics, and a map of the cache."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

import moe_local
from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cli.exchanges import Shown
from moe_local.cli.server import refusals
from moe_local.cli.server.answers import Answer, Choice
from moe_local.cli.server.failures import MESSAGES, Failure
from moe_local.cli.server.guard import Guard, Traffic
from moe_local.cli.server.input_items import listing
from moe_local.cli.server.kept import KeptResponses
from moe_local.cli.server.logprobs import TokenNames
from moe_local.cli.server.message_request import CountRequest, MessageRequest
from moe_local.cli.server.message_shape import MessageShape
from moe_local.cli.server.metrics import Metrics
from moe_local.cli.server.models import Models
from moe_local.cli.server.page import Page
from moe_local.cli.server.prompts import Prompts
from moe_local.cli.server.protocol import ChatRequest, CompletionRequest, Sampling
from moe_local.cli.server.response_request import InputTokensRequest, ResponseRequest
from moe_local.cli.server.response_shape import ResponseShape
from moe_local.cli.server.shapes import ChatShape, Shape, TextShape
from moe_local.cli.server.text import StopFilter
from moe_local.cli.server.watch import Watch
from moe_local.offload.answer_format.answer_parser import AnswerParser
from moe_local.offload.batcher import Batcher, Ended

SILENCE_SECONDS = 15.0
"""After which a stream shows that the server lives, where clients know how: some give up on it otherwise."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, under which names, and how many."""

    api_key: str | None = None
    origins: tuple[str, ...] = ()
    """Web pages of other hosts that may ask; none by default."""
    hosts: tuple[str, ...] | None = None
    """Names under which the server may be asked; None: any. See Guard."""
    body_bytes: int = 8 << 20
    max_tokens: int | None = None
    """Most new tokens of an answer; None: what the context holds."""
    patience_s: float = 300.0
    """How long a request may wait in the queue."""
    seconds: float | None = None
    """How long an answer may take; None: as long as it takes."""
    aliases: tuple[str, ...] = ()
    """Other names under which clients may ask for the model."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template, for requests that do not give them."""


class Server:
    """A model behind HTTP. Requests step together in the batcher; the event loop only waits for them."""

    def __init__(self, model: moe_local.Model, batcher: Batcher, limits: Limits) -> None:
        """`model` and `batcher` are the caller's to close."""
        self.model = model
        self.batcher = batcher
        self.limits = limits
        self.name = model.name
        self.metrics = Metrics(batcher)
        names = (self.name, *limits.aliases)
        self.models = Models(names, self.metrics.started, model.plan.request.context)
        self.watch = Watch(model, batcher)
        self.page = Page()
        self.answers = model.answers
        self.prompts = Prompts(model, self.answers, limits.max_tokens, limits.variables)
        self.names = TokenNames(model.tokenizer)
        self.kept = KeptResponses()
        self.traffic = Traffic()

    def app(self) -> FastAPI:
        app = FastAPI(title="moe-local", version=moe_local.__version__, docs_url=None, redoc_url=None)
        app.add_exception_handler(MoeLocalError, self._failed)
        refusals.add_to(app)
        app.add_middleware(
            Guard,
            api_key=self.limits.api_key,
            body_bytes=self.limits.body_bytes,
            hosts=self.limits.hosts,
            traffic=self.traffic,
        )
        if self.limits.origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(self.limits.origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
            )
        app.add_api_route("/", self.page.give, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.prometheus, methods=["GET"], response_class=PlainTextResponse)
        app.add_api_route("/v1/cache", self.watch.report, methods=["GET"])
        app.add_api_route("/v1/models", self.models.all, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.models.one, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        app.add_api_route("/v1/responses", self.respond, methods=["POST"])
        app.add_api_route("/v1/responses/input_tokens", self.count_input, methods=["POST"])
        app.add_api_route("/v1/responses/{name}", self.one_response, methods=["GET"])
        app.add_api_route("/v1/responses/{name}/input_items", self.input_items, methods=["GET"])
        app.add_api_route("/v1/responses/{name}", self.forget, methods=["DELETE"])
        app.add_api_route(MESSAGES, self.message, methods=["POST"])
        app.add_api_route(f"{MESSAGES}/count_tokens", self.count, methods=["POST"])
        return app

    # What is there

    async def health(self) -> JSONResponse:
        state = {"status": "stopping" if self.traffic.stopping else "ok"}
        counts = {"running": self.batcher.running, "waiting": self.batcher.waiting}
        return JSONResponse({**state, **counts}, status_code=503 if self.traffic.stopping else 200)

    async def prometheus(self) -> Response:
        text = self.metrics.render(await self.watch.picture())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    # Answers

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        prompt, answer = await self._conversation(asked, "chatcmpl-")
        shape = ChatShape(answer, self._names(asked), counted=asked.include_usage)
        return await self._answer(request, asked, answer, [prompt], shape)

    async def respond(self, given: ResponseRequest, request: Request) -> Response:
        """A chat whose messages and whose answer are written otherwise."""
        earlier = self.kept.before(given.previous_response_id)
        asked = given.chat(earlier.items if earlier else ())
        prompt, answer = await self._conversation(asked, "resp_")

        def keep(response: dict[str, Any]) -> None:
            if given.store:
                self.kept.add(response, given.items, earlier)

        shape = ResponseShape(answer, given.settings(), given.spaced(), self._names(asked), keep)
        return await self._answer(request, asked, answer, [prompt], shape)

    async def one_response(self, name: str) -> dict[str, Any]:
        return self.kept.get(name).response

    async def input_items(
        self,
        name: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        items = self.kept.get(name).asked
        return listing(items, after=after, limit=limit, newest_first=order == "desc")

    async def count_input(self, given: InputTokensRequest) -> dict[str, Any]:
        """How many tokens the prompt of such a response has."""
        earlier = self.kept.before(given.previous_response_id)
        asked = given.chat(earlier.items if earlier else ())
        return {"object": "response.input_tokens", "input_tokens": len((await self._shown(asked)).prompt)}

    async def forget(self, name: str) -> dict[str, Any]:
        self.kept.remove(name)
        return {"id": name, "object": "response", "deleted": True}

    async def message(self, given: MessageRequest, request: Request) -> Response:
        """The same as Anthropic's clients write it."""
        refusals.check_fields(request, given)
        asked = given.chat()
        prompt, answer = await self._conversation(asked, "msg_")
        return await self._answer(request, asked, answer, [prompt], MessageShape(answer))

    async def count(self, given: CountRequest, request: Request) -> dict[str, Any]:
        """How many tokens the prompt of such a message has."""
        refusals.check_fields(request, given)
        return {"input_tokens": len((await self._shown(given.chat())).prompt)}

    async def _shown(self, asked: ChatRequest) -> Shown[list[int]]:
        """The prompt of a request that is in order."""
        with self._as_failures():
            self.models.check(asked.model)
            asked.check()
            return await self.prompts.conversation(asked)

    async def _conversation(self, asked: ChatRequest, kind: str) -> tuple[list[int], Answer]:
        """Token ids of the prompt, and the answer that is to follow. `kind`: the prefix of its id."""
        shown = await self._shown(asked)
        functions, one_call = asked.functions, asked.parallel_tool_calls is False
        answer = Answer(kind, self.name, self.answers.call_id)
        answer.left_out = shown.left_out
        for index in range(asked.n):
            parser = self.answers.parser(shown.prompt, functions=functions, one_call=one_call)
            answer.add(Choice(index, StopFilter(asked.stops), parser, again=index > 0))
        return shown.prompt, answer

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        with self._as_failures():
            self.models.check(asked.model)
            asked.check()
            prompts = [await self.prompts.text(prompt) for prompt in asked.prompts()]
            echoes = [await self.prompts.echo(prompt) if asked.echo else None for prompt in prompts]
        answer = Answer("cmpl-", self.name, self.answers.call_id)
        for index in range(asked.n * len(prompts)):
            parser = AnswerParser(plain=True)
            choice = answer.add(Choice(index, StopFilter(asked.stops), parser, again=index % asked.n > 0))
            choice.echo, choice.mute = echoes[index // asked.n], asked.only_echo
        shape = TextShape(answer, self._names(asked), counted=asked.include_usage)
        return await self._answer(request, asked, answer, prompts, shape)

    def _names(self, asked: Sampling) -> TokenNames | None:
        """For log probabilities, where they are asked for."""
        return None if asked.likeliest is None else self.names

    async def _answer(
        self, request: Request, asked: Sampling, answer: Answer, prompts: list[list[int]], shape: Shape
    ) -> Response:
        with self._as_failures():
            if len(answer.choices) > self.batcher.capacity:
                raise OptionError(
                    f"{len(answer.choices)} answers are asked for at once, {self.batcher.capacity} can be "
                    "under way or wait here; ask for fewer"
                )
            try:
                for choice in answer.choices:
                    self._submit(
                        asked, answer, choice, prompts[choice.index // asked.n], choice.index % asked.n
                    )
            except BaseException:
                answer.cancel()
                raise
        if asked.stream:
            return _Stream(answer, self._stream(answer, shape))
        whole = asyncio.ensure_future(self._whole(answer, shape))
        with answer:
            try:
                while not whole.done():
                    await asyncio.wait([whole], timeout=0.25)
                    if not whole.done() and await request.is_disconnected():
                        return Response(status_code=499)
                with self._as_failures():
                    return JSONResponse(whole.result())
            finally:
                whole.cancel()

    def _submit(
        self, asked: Sampling, answer: Answer, choice: Choice, prompt: list[int], number: int
    ) -> None:
        options = asked.generation(number, self.answers)
        room = self.model.plan.request.context - len(prompt) + 1
        wanted = asked.most_tokens or self.limits.max_tokens or room
        most = min(wanted, self.limits.max_tokens or wanted)
        options["max_new_tokens"] = max(1, min(most, room))
        choice.room = room if room < most else None
        if self.limits.seconds is not None:
            options["max_time"] = self.limits.seconds
        listener = self.metrics.watching(answer.listener(choice))
        answer.started(
            choice,
            self.model.submit(
                self.batcher,
                prompt,
                listener,
                stop=asked.stops or None,
                patience_s=self.limits.patience_s,
                **options,
            ),
        )

    async def _whole(self, answer: Answer, shape: Shape) -> dict[str, Any]:
        async for choice, pieces, _ in answer.events():
            for piece in pieces:
                choice.calls += piece.call is not None
                shape.keep(choice, piece)
        return shape.whole()

    async def _stream(self, answer: Answer, shape: Shape) -> AsyncIterator[str]:
        try:
            for chunk in shape.opening():
                yield _event(chunk)
            async for choice, pieces, event in answer.events(SILENCE_SECONDS):
                if event is None:
                    for chunk in shape.waiting():
                        yield _event(chunk)
                for piece in pieces:
                    for chunk in shape.delta(choice, piece):
                        yield _event(chunk)
                    choice.calls += piece.call is not None
                if isinstance(event, Ended):
                    for chunk in shape.closing(choice):
                        yield _event(chunk)
            for chunk in shape.ending():
                yield _event(chunk)
        except MoeLocalError as error:
            yield _event(shape.failed(self._failure(error)))
        if shape.end is not None:
            yield f"data: {shape.end}\n\n"

    def _failure(self, error: MoeLocalError) -> Failure:
        if self.traffic.stopping and not isinstance(error, OptionError):
            return Failure(503, str(error), "server_error")
        return Failure.of(error)

    @contextlib.contextmanager
    def _as_failures(self) -> Iterator[None]:
        try:
            yield
        except MoeLocalError as error:
            raise self._failure(error) from error

    async def _failed(self, request: Request, error: Any) -> JSONResponse:
        return await refusals.failed(request, self._failure(error))


class _Stream(StreamingResponse):
    """Server-sent events. Whatever becomes of it, its answer is not computed further than it is sent."""

    def __init__(self, answer: Answer, chunks: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._answer:
            await super().__call__(scope, receive, send)


def _event(chunk: dict[str, Any]) -> str:
    """As a server-sent event; one that has a type says it in a line of its own, too."""
    kind = f"event: {chunk['type']}\n" if "type" in chunk else ""
    return f"{kind}data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
