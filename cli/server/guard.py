"""What a request must have before anything of it is read: the key, our name, a body that is not too long."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Any

from moe_local.cli.server.failures import BodyTooLong, send_raw

Scope = dict[str, Any]
OPEN_PATHS = ("/", "/health")
"""What is told without a key: the page, which asks for it, and whether the server lives."""


@dataclass(slots=True)
class Traffic:
    """What is going on in a server; written in its event loop."""

    answering: int = 0
    """Requests for answers that have been let in and whose last byte is not written yet."""
    stopping: bool = False
    """Nothing new is let in."""


class Guard:
    """ASGI middleware. `hosts`: names under which it may be asked, None for any.

    Without a key those are this machine's own names. Otherwise a web page whose host name was made to resolve
    to 127.0.0.1 (DNS rebinding) could ask, and read the answers, as if it came from here.
    """

    def __init__(
        self,
        app: Any,
        *,
        api_key: str | None,
        body_bytes: int,
        hosts: tuple[str, ...] | None,
        traffic: Traffic,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._body_bytes = body_bytes
        self._hosts = None if hosts is None else frozenset(name.lower() for name in hosts)
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await send_raw(scope, send, *refusal)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body_bytes:  # a body in chunks says no length before
                raise BodyTooLong(seen, self._body_bytes)
            return message

        if scope["method"] == "HEAD":  # as what watches servers asks; uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        if scope["method"] != "POST":
            await self._app(scope, counted, send)
            return
        self._traffic.answering += 1
        try:
            await self._app(scope, counted, send)
        finally:
            self._traffic.answering -= 1

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        """Status, message and kind of what is wrong with a request."""
        if self._hosts is not None and (name := _name(headers)) not in self._hosts:
            return (
                403,
                f"the request is for {name or 'no host'}, which is not this machine; ask for 127.0.0.1, "
                "or start the server with --api-key",
                "permission_error",
            )
        if self._key is not None and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            return (
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY, or X-Api-Key: KEY",
                "authentication_error",
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body_bytes:
            return 413, BodyTooLong(int(length), self._body_bytes).detail, "invalid_request_error"
        if scope["method"] != "POST":
            return None
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # what pages of other hosts can send without asking is not
            return (
                415,
                f"the body is {kind.decode('latin-1') or 'of no type'}; send Content-Type: application/json",
                "invalid_request_error",
            )
        if self._traffic.stopping:
            return 503, "the server is stopping", "server_error"
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = (token if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b""))
        assert self._key is not None
        # in a time that does not depend on how much of it is right
        return any(hmac.compare_digest(one.strip(), self._key) for one in given)


def _name(headers: dict[bytes, bytes]) -> str:
    """The host that a request is for, without its port; of IPv6 addresses without the brackets."""
    host = headers.get(b"host", b"").decode("latin-1").strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
