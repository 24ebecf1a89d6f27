"""A connection that does not wait for ever: for a request that never ends, or a client that never reads."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_local.cli.server.failures import raw, send_raw

REQUEST_SECONDS = 60.0
"""For a request to arrive, from its first byte, or from the connection, to its last."""
READ_SECONDS = 60.0
"""For a client to read on, when it has let all buffers on the way fill up."""
CLOSE_SECONDS = 5.0
"""For what was written last to leave."""
SEND_BYTES = 128 << 10
"""That the system keeps for a client; uvicorn keeps 64 KiB more."""
CONNECTIONS = 256
"""Requests of further connections are answered with 503; those beyond twice as many are not heard at all."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, with limits, and with errors that look like the API's.

    A client that closes its sending side has gone away: what it asked for is not computed any further. One
    that does so in the middle of a request is told.
    """

    request_seconds = REQUEST_SECONDS
    read_seconds = READ_SECONDS
    most = CONNECTIONS

    def __init__(
        self, config: Config, server_state: Any, app_state: dict[str, Any], _loop: Any = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._request_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # tokens are small: with room for megabytes of them nobody would notice a client that does not read
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if len(self.connections) > 2 * self.most:
            transport.abort()
        elif len(self.connections) > self.most:
            self.app = _no_room
        self._mind_request(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._mind_request(False)
        self._mind_reading(False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        unfinished = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        self._mind_request(unfinished and not self.transport.is_closing())

    def eof_received(self) -> None:
        if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.SEND_RESPONSE:
            self.refuse(400, "the request ended before its body did")
        # None: the transport closes by itself, and what runs for this client is cancelled

    def pause_writing(self) -> None:
        super().pause_writing()
        self._mind_reading(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._mind_reading(False)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "this is not HTTP/1.1, or its head is too long")

    def refuse(self, status: int, message: str) -> None:
        """An error from outside the application, if none of an answer has been sent yet; then the end."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            path = self.scope["path"] if self.scope else ""
            headers, body = raw(status, message, "invalid_request_error", path)
            events = (
                h11.Response(status_code=status, headers=headers, reason=b""),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None:
                self.cycle.disconnected = True  # the application's answer, if one comes, is not for sending
                self.cycle.message_event.set()
        self.transport.close()
        self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def _mind_request(self, expected: bool) -> None:
        """Whether (more of) a request has to come; each further part does not get its time anew."""
        if expected and self._request_timer is None:
            self._request_timer = self.loop.call_later(self.request_seconds, self._request_is_late)
        elif not expected and self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _mind_reading(self, expected: bool) -> None:
        """Whether the client has to read before more can be sent."""
        if expected and self._read_timer is None:
            self._read_timer = self.loop.call_later(self.read_seconds, self.transport.abort)
        elif not expected and self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _request_is_late(self) -> None:
        self._request_timer = None
        if self.transport.is_closing():
            self.transport.abort()
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # a connection that nothing came over
        else:
            self.refuse(408, f"the request was not there within {self.request_seconds:g} s")


async def _no_room(scope: Any, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    await send_raw(scope, send, 503, "there are too many connections; try again later", "server_error")
