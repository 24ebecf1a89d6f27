"""32 clients at once, some of them rude: every answer is right, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

import moe_local

CLIENTS = 32
QUESTIONS = (
    *("What is an expert?", "What is a router?", "Why does prefetch help?", "What is a cache miss?"),
    *("hello", "What can you do?", "Tell me about tokens.", "What is moe-local?"),
)
TOKENS = 24
GROWTH = 12 << 20
"""Bytes of memory that may come between a third of the time and its end."""


@pytest.fixture(scope="module")
def crowded() -> Iterator[moe_local.Model]:
    # in fp32, since rows step together in one forward and alone in another
    with moe_local.load("demo", slots=3, parallel=8, device="cpu", dense="fp32") as loaded:
        yield loaded


class Load:
    """The clients, in one event loop."""

    def __init__(self, url: str, expected: dict[str, str], seconds: float) -> None:
        self._url = url
        self._expected = expected
        self._ends = time.monotonic() + seconds
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[int] = []

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=CLIENTS + 4, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client:
            clients = [asyncio.create_task(self._client(client, number)) for number in range(CLIENTS)]
            process = psutil.Process()
            while not all(task.done() for task in clients):
                if self.done.total() >= CLIENTS:  # the first answers bring what stays, however long they take
                    self.memory.append(process.memory_info().rss)
                await asyncio.sleep(0.25)
            await asyncio.gather(*clients)
            self.memory.append(process.memory_info().rss)

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        """Something at least, however little time there is: among so many, somebody begins with each kind."""
        chance = random.Random(number)
        over = False
        while not over:
            await chance.choices(
                (self._whole, self._streamed, self._hangs_up, self._nonsense, self._looks),
                (40, 40, 8, 6, 6),
            )[0](client, chance)
            over = time.monotonic() >= self._ends

    def _body(self, chance: random.Random, **options: Any) -> tuple[str, dict[str, Any]]:
        question = chance.choice(QUESTIONS)
        messages = [{"role": "user", "content": question}]
        return question, {"messages": messages, "max_tokens": TOKENS, "temperature": 0, **options}

    def _check(self, kind: str, question: str, text: str) -> None:
        self.done[kind] += 1
        if text != self._expected[question]:
            self.wrong.append(f"{kind}: {question} {text}")

    async def _whole(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        scored: dict[str, Any] = chance.choice(({}, {"logprobs": True, "top_logprobs": chance.randint(0, 3)}))
        question, body = self._body(chance, **scored)
        reply = await client.post("/v1/chat/completions", json=body)
        if reply.status_code != 200:
            self.wrong.append(reply.text)
            return
        answer = reply.json()
        choice, count = answer["choices"][0], answer["usage"]["completion_tokens"]
        if len((choice["logprobs"] or {}).get("content", ())) != (count if scored else 0):
            self.wrong.append(reply.text)
        self._check("whole", question, choice["message"]["content"])

    async def _streamed(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        question, body = self._body(chance, stream=True)
        text = ""
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        self._check("streamed", question, text)

    async def _hangs_up(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        _, body = self._body(chance, stream=True, max_tokens=1000, n=2)
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                if chance.random() < 0.2:
                    break
        self.done["hung up"] += 1

    async def _nonsense(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        content = chance.choice((b"{", b"[]", b'{"messages": 3}', b'{"messages": []}', b"x" * 5000))
        headers = {"content-type": "application/json"}
        reply = await client.post("/v1/chat/completions", content=content, headers=headers)
        self.done["nonsense"] += 1
        if reply.status_code != 400:
            self.wrong.append(f"{reply.status_code} for {content!r}")

    async def _looks(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        reply = await client.get(chance.choice(("/v1/cache", "/metrics", "/health")))
        self.done["looked"] += 1
        if reply.status_code != 200:
            self.wrong.append(reply.text)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(1.2, id="seconds"),
        pytest.param(120, id="two minutes", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_many_clients(serving: Any, crowded: moe_local.Model, seconds: float) -> None:
    expected = {
        question: crowded.generate(
            [{"role": "user", "content": question}], max_new_tokens=TOKENS, do_sample=False
        ).text
        for question in QUESTIONS
    }
    process = psutil.Process()
    with serving(crowded, queue=128) as server:
        server.health()
        server.until(lambda: not server.web.server_state.connections)
        threads, files = process.num_threads(), process.num_fds()
        load = Load(server.url, expected, seconds)
        asyncio.run(load.run())
        server.until_idle()
        server.until(lambda: not server.web.server_state.connections)
        gc.collect()
        # the event loop may have made helpers for encoding prompts; they are few, and stay
        assert process.num_threads() <= threads + 20
        server.until(lambda: process.num_fds() <= files)
        assert not server.server.traffic.answering
    crowded.check_integrity()
    assert load.wrong == []
    assert all(load.done[kind] > 0 for kind in ("whole", "streamed", "hung up", "nonsense", "looked"))
    count = len(load.memory)
    settled, last = load.memory[count // 3 : count // 2 + 1], load.memory[-(count // 10) - 1 :]
    growth = statistics.median(last) - statistics.median(settled)
    print(f"{dict(load.done)} in {seconds} s, {growth / 1e6:+.1f} MB, {max(last) / 1e6:.0f} MB in all")
    assert growth < GROWTH
