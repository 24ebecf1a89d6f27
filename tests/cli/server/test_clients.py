"""Clients that are slow, gone, too many, wrong or malicious: each is told, and nobody else notices."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import moe_local
from moe_local.cli.server.connection import Connection

QUESTION = [{"role": "user", "content": "What is a router?"}]
LONG = {"messages": QUESTION, "max_tokens": 1500, "temperature": 2.0}


def head(length: int, path: str = "/v1/chat/completions") -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def request(body: dict[str, Any]) -> bytes:
    encoded = json.dumps(body).encode()
    return head(len(encoded)) + encoded


@contextlib.contextmanager
def connected(server: Any) -> Iterator[socket.socket]:
    with socket.create_connection((server.host, server.port), timeout=60) as connection:
        yield connection


def said(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):  # so it ends where not all was read that was sent
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def parsed(reply: bytes) -> tuple[int, dict[str, Any]]:
    """Status and body of an error."""
    first, _, body = reply.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(body)


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of an error, to whose end the server closes."""
    return parsed(said(connection))


def ask(server: Any, **options: Any) -> str:
    """A quick answer: the server lives."""
    body = {"messages": QUESTION, "max_tokens": 3, "temperature": 0, **options}
    reply = server.http.post(f"{server.url}/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    content: str = reply.json()["choices"][0]["message"]["content"]
    return content


class TestSlow:
    @pytest.mark.parametrize(
        "begun", [b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n", head(100) + b'{"messages"']
    )
    @pytest.mark.slow
    def test_a_request_that_drips(self, server: Any, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Connection, "request_seconds", 0.6)
        reply = b""
        while (
            not reply
        ):  # should we stand still here before the first byte, the connection ends without a word
            with connected(server) as slow:
                with contextlib.suppress(ConnectionError):  # or before the last one
                    for byte in begun[:-3]:  # it moves all the time, which does not help
                        slow.send(bytes([byte]))
                    time.sleep(0.1)
                    slow.send(begun[-3:])
                reply = said(slow)
        status, body = parsed(reply)
        assert status == 408
        assert body["error"]["message"] == "the request was not there within 0.6 s"
        monkeypatch.undo()
        server.until_idle()

    def test_a_connection_that_says_nothing(self, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as impatient:
            impatient.setattr(Connection, "request_seconds", 0.6)
            with connected(server) as silent:
                assert silent.recv(100) == b""
        server.until(lambda: not server.web.server_state.connections)
        monkeypatch.setattr(server.web.config, "timeout_keep_alive", 60)
        connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
        with contextlib.closing(connection) as again:
            for _ in range(2):
                again.request("GET", "/health")
                assert again.getresponse().read()
                (kept,) = server.web.server_state.connections
                assert kept._request_timer is None, "it was whole: only keep-alive's own time counts after it"

    def test_a_client_that_does_not_read(
        self, serving: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Connection, "read_seconds", 0.4)
        endless = scripted("x" * 1000, size=1000, times=5000)
        with serving(endless) as server, socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((server.host, server.port))
            deaf.sendall(request({**LONG, "stream": True}))
            server.until(lambda: not server.server.traffic.answering and bool(endless.tickets))
            assert endless.tickets[0].cancelled
            assert not server.web.server_state.connections

    def test_who_reads_slowly_holds_nobody_up(self, server: Any) -> None:
        alone = ask(server, max_tokens=30)
        with connected(server) as deaf:
            deaf.sendall(
                request({"messages": QUESTION, "max_tokens": 200, "temperature": 2.0, "stream": True})
            )
            assert ask(server, max_tokens=30) == alone
            server.until(lambda: server.batcher.running == 0)


class TestGone:
    def test_half_closed_in_the_middle_of_a_body(self, server: Any) -> None:
        with connected(server) as half:
            half.sendall(head(1000) + b'{"messages": [')
            half.shutdown(socket.SHUT_WR)
            status, body = answer(half)
        assert status == 400
        assert body["error"]["message"] == "the request ended before its body did"

    @pytest.mark.parametrize("stream", [False, True])
    def test_half_closed_while_an_answer_is_computed(self, server: Any, stream: bool) -> None:
        with connected(server) as half:
            begun = server.batcher.prompt_tokens
            half.sendall(request({**LONG, "stream": stream}))
            # not only while it runs: all of it may have passed when we look
            server.until(lambda: server.batcher.running > 0 or server.batcher.prompt_tokens > begun)
            half.shutdown(socket.SHUT_WR)
            while half.recv(65536):
                pass
            server.until_idle()
        ask(server)

    def test_reset_in_the_middle_of_a_stream(self, server: Any) -> None:
        with connected(server) as gone:
            gone.sendall(request({**LONG, "n": 3, "stream": True}))
            gone.recv(10)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.until_idle()
        ask(server)

    def test_gone_before_the_first_byte(self, server: Any) -> None:
        for _ in range(20):
            with connected(server) as gone:
                gone.sendall(request({**LONG, "stream": True}))
        server.until_idle()
        ask(server)


def test_too_many_connections(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.until(lambda: not server.web.server_state.connections)
    monkeypatch.setattr(Connection, "most", 3)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connected(server)) for _ in range(6)]
        server.until(lambda: len(server.web.server_state.connections) == 6)
        for connection in crowd[3:]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            status, body = answer(connection)
            assert status == 503
            assert body["error"]["message"] == "there are too many connections; try again later"
        beyond = [stack.enter_context(connected(server)) for _ in range(6)]
        ends = []
        for connection in beyond[3:]:
            with contextlib.suppress(ConnectionError):
                ends.append(connection.recv(100))
        assert not any(ends), "beyond twice as many nobody is heard"
    ask(server)


@pytest.mark.parametrize(
    "nonsense", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"G" * 200_000, head(-1)]
)
def test_what_is_no_http(server: Any, nonsense: bytes) -> None:
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(nonsense)
        status, body = answer(connection)
        assert status == 400
        assert "HTTP/1.1" in body["error"]["message"]
    ask(server)


class TestNames:
    """A page of the Web whose name was made to mean this machine is not this machine."""

    @pytest.fixture(scope="class")
    def own(self, serving: Any) -> Iterator[Any]:
        with serving(hosts=("localhost", "127.0.0.1", "::1")) as running:
            yield running

    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("localhost", 200),
            ("LocalHost:8000", 200),
            ("127.0.0.1:1", 200),
            ("[::1]:8000", 200),
            ("evil.example", 403),
            ("localhost.evil.example:8000", 403),
            ("", 403),
        ],
    )
    def test_who_is_asked(self, own: Any, host: str, status: int) -> None:
        reply = own.http.get(f"{own.url}/v1/models", headers={"Host": host})
        assert reply.status_code == status
        if status == 403:
            assert "start the server with --api-key" in reply.json()["error"]["message"]


class TestStopping:
    def test_answers_under_way_come_to_their_end(self, serving: Any, scripted: Any) -> None:
        says = scripted("word ", size=5, times=80, hold=20)
        with serving(says, grace_s=300) as server, httpx.Client(timeout=60) as client:
            body = {"messages": QUESTION, "stream": True}
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as stream:
                lines = stream.iter_lines()
                got = [next(lines)]
                server.web.stop()
                server.until(lambda: says.said == 20)
                refused = server.http.post(f"{server.url}/v1/chat/completions", json=body)
                assert refused.status_code == 503
                assert refused.json()["error"]["message"] == "the server is stopping"
                assert int(refused.headers["retry-after"]) > 0
                health = server.http.get(f"{server.url}/health")
                assert health.status_code == 503
                assert health.json()["status"] == "stopping"
                says.go.set()
                got += lines
            chunks = [json.loads(line[6:]) for line in got if line.startswith("data: {")]
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == 80 * "word "
            assert got[-2:] == ["data: [DONE]", ""]
            server.thread.join(60)
            assert not server.thread.is_alive()

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_takes_too_long_is_cut(self, serving: Any, stream: bool) -> None:
        with serving(grace_s=0.01) as server:
            with connected(server) as connection:
                connection.sendall(request({**LONG, "n": 16, "stream": stream}))
                server.until(lambda: server.batcher.running == 3)
                server.web.stop()
                parts = []
                while part := connection.recv(65536):
                    parts.append(part)
            text = b"".join(parts).decode()
            assert "the server is stopping" in text
            if not stream:
                assert text.startswith("HTTP/1.1 503")
            server.thread.join(60)
            assert not server.thread.is_alive()


NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1e308, -1e308, 2**63, 10**400, 0.5, float("nan"), float("inf")),
    *("", "x", "\ud800", "\x00", "\n" * 3000, "<|assistant|>", "💥" * 50, "1"),
    *([], {}, [[]], [None], [{}], ["x"] * 300, {"": {}}, {"role": "user"}, {"type": "text", "text": 3}),
    [{"role": "user", "content": "hi"}] * 3,
    [{"role": "assistant", "content": None, "tool_calls": [{"function": "f"}]}],
]
DEEP_CALL = {"function": {"name": "f", "arguments": "[" * 100_000}}


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"max_tokens": 1, "messages": QUESTION},
    "/v1/completions": {"max_tokens": 1, "prompt": "The router"},
    "/v1/responses": {
        "max_output_tokens": 1,
        "input": [
            *QUESTION,
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Which?"}]},
            {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "a"}]},
        ],
    },
}


def mutated(body: dict[str, Any], chance: random.Random) -> bytes:
    """A body with some values in its depth replaced, then perhaps with some bytes."""
    names = [*body, *body, "tools", "tool_choice", "stop", "seed", "n", "logit_bias", "user", "unknown"]
    names += ["logprobs", "top_logprobs", "echo", "text", "include", "reasoning"]
    for _ in range(chance.randint(1, 2)):
        where: Any = body
        name: Any = chance.choice(names)
        inner = body.get(name)
        while isinstance(inner, list | dict) and inner and chance.random() < 0.8:
            where, name = inner, chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = where[name]
        where[name] = chance.choice(NASTY)
    text = bytearray(json.dumps(body).encode())
    if chance.random() < 0.2:
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(text))
            text[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 2))
    return bytes(text)


def test_bodies_that_nobody_would_write(server: Any) -> None:
    chance = random.Random(1)
    seen = []
    with httpx.Client(timeout=60) as client:
        for _ in range(300):
            path = chance.choice(list(BODIES))
            body = {**json.loads(json.dumps(BODIES[path])), "temperature": 0, "stream": chance.random() < 0.2}
            content = mutated(body, chance)
            reply = client.post(
                server.url + path, content=content, headers={"content-type": "application/json"}
            )
            seen.append(reply.status_code)
            assert reply.status_code in (200, 400, 404), (content, reply.text)
            if reply.status_code != 200:
                error = reply.json()["error"]
                assert error["message"]
                assert {"type", "param", "code"} <= error.keys()
    assert seen.count(200) > 10
    assert seen.count(400) > 50
    deep = b'{"messages": ' + b"[" * 100_000
    for content in (deep, b'{"seed": ' + b"9" * 10_000 + b"}", b'{"messages": "' + b"x" * 300_000):
        headers = {"content-type": "application/json"}
        reply = server.http.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"]
    server.until_idle()
    ask(server)


def test_arguments_that_are_nested_too_deeply(
    serving: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    template = f"{{% for m in messages %}}{{{{ m.content }}}}{calls}{{% endfor %}}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [DEEP_CALL]}, *QUESTION]
    with serving(model) as server:
        assert ask(server, messages=messages, max_tokens=1)
