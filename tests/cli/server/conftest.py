"""Servers in threads of their own, on free ports, over the demo model or over answers written beforehand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import openai
import pytest

import moe_local
from moe_local.cache.errors import MoeLocalError
from moe_local.cli.server import watch
from moe_local.cli.server.app import Limits, Server
from moe_local.cli.server.web import Web
from moe_local.offload.batcher import Ended, Listener, Ticket
from moe_local.offload.engine.sequence import FinishReason
from moe_local.offload.records import Token

PATIENCE = 60.0


@pytest.fixture(scope="module", autouse=True)
def _pictures_are_waited_for() -> Iterator[None]:
    """Not for 2 s only, after which an older one is given: a machine may stand still for that long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "PATIENCE_SECONDS", PATIENCE)
        yield


class Running:
    """A server that answers; leave `serving` to stop it."""

    http = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
    """Waits longer than httpx by itself, and keeps no connection open: servers are asked whether any is."""

    def __init__(self, model: Any, *, queue: int, grace_s: float = 30.0, **limits: Any) -> None:
        self.batcher = model.batcher(queue=queue)
        self.server = Server(model, self.batcher, Limits(**limits))
        self.web = Web(self.server, "127.0.0.1", 0, grace_s=grace_s)
        self.web.config.timeout_graceful_shutdown = int(PATIENCE)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.web.serve()))
        self.thread.start()
        self.until(lambda: self.web.started)
        self.host, self.port = self.web.addresses[0]
        self.url = f"http://{self.host}:{self.port}"

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def health(self) -> dict[str, Any]:
        state: dict[str, Any] = self.http.get(f"{self.url}/health").json()
        return state

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of a stream whose events name their types, too."""
        reply = self.http.post(self.url + path, json={**body, "stream": True})
        assert reply.status_code == 200, reply.text
        found = []
        for block in reply.text.removesuffix("\n\n").split("\n\n"):
            kind, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert kind == f"event: {event['type']}"
            found.append(event)
        return found

    def until_idle(self) -> None:
        self.until(lambda: self.health() == {"status": "ok", "running": 0, "waiting": 0})

    def stop(self) -> None:
        self.web.stop()
        self.web.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.batcher.close()


class Scripted:
    """Says `text` in pieces of `size` characters, `times` times, `pause_s` seconds apart; then ends.

    With `hold`, the rest waits behind so many pieces until `go` is set. Where they are asked for, the log
    probability of a piece is minus its number.
    """

    def __init__(
        self,
        model: moe_local.Model,
        text: str,
        *,
        size: int = 3,
        times: int = 1,
        pause_s: float = 0.0,
        hold: int | None = None,
        silent: int = 0,
        error: MoeLocalError | None = None,
    ) -> None:
        """`silent`: tokens without a text, at the end. `error`: how it ends."""
        self._model = model
        self.text = text
        self.size = size
        self.times = times
        self.pause_s = pause_s
        self.hold = hold
        self.silent = silent
        self.error = error
        self.go = threading.Event()
        self.said = 0
        """Pieces so far."""
        self.tickets: list[Ticket] = []
        self.prompts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def submit(self, batcher: Any, prompt: list[int], listener: Listener, **options: Any) -> Ticket:
        ticket = Ticket(list(prompt), None, None, listener, None, time.perf_counter())  # type: ignore[arg-type]
        self.tickets.append(ticket)
        self.prompts.append(self._model.tokenizer.decode(prompt))
        threading.Thread(target=self._say, args=(ticket, options.get("logprobs"))).start()
        return ticket

    def _say(self, ticket: Ticket, logprobs: int | None) -> None:
        pieces = [self.text[at : at + self.size] for at in range(0, len(self.text), self.size)] * self.times
        pieces += [""] * self.silent
        for number, piece in enumerate(pieces):
            if ticket.cancelled:
                ticket.listener(Ended(None))
                return
            scores = () if logprobs is None else (-float(number), ())
            ticket.listener(Token(piece, 1, 1.0, 0.0, 1, 0, 0, 0, None, *scores))
            self.said += 1
            time.sleep(self.pause_s)
            if self.said == self.hold:
                self.go.wait(PATIENCE)
        ticket.listener(Ended(FinishReason.STOP if self.error is None else None, self.error))


Serving = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def model() -> Iterator[moe_local.Model]:
    # in fp32, since answers are compared whose prompts are computed in other portions
    with moe_local.load("demo", slots=8, parallel=3, device="cpu", dense="fp32") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def serving(request: pytest.FixtureRequest) -> Serving:
    """serving(model, queue=..., **limits): a running server, over `model` if none is given."""

    @contextmanager
    def serve(of: Any = None, queue: int = 16, **options: Any) -> Iterator[Running]:
        running = Running(of or request.getfixturevalue("model"), queue=queue, **options)
        try:
            yield running
        finally:
            running.stop()

    return serve


@pytest.fixture(scope="module")
def server(serving: Serving, model: moe_local.Model) -> Iterator[Running]:
    with serving(origins=("https://page.example",), aliases=("small-1",)) as running:
        yield running
    model.check_integrity()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="session")
def scripted(model: moe_local.Model) -> Callable[..., Scripted]:
    """scripted(text, size=3, times=1, pause_s=0.0, hold=None, silent=0, error=None)"""
    return lambda text, **options: Scripted(model, text, **options)
