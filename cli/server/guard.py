"""What a request must have before anything of it is read: the key, and a body that is not too long."""

from __future__ import annotations

import hmac
import json
from typing import Any

from starlette.exceptions import HTTPException

Scope = dict[str, Any]


class Guard:
    """ASGI middleware. Everything but /health asks for the key, if there is one."""

    def __init__(self, app: Any, *, api_key: str | None, body_bytes: int) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] != "/health" and not self._has_key(headers):
            await _refuse(send, 401, "the API key is missing or wrong; send Authorization: Bearer KEY")
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body_bytes:
            await _refuse(send, 413, self._too_long(int(length)))
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body_bytes:  # a body in chunks says no length before
                raise HTTPException(413, self._too_long(seen))
            return message

        await self._app(scope, counted, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        assert self._key is not None
        # in a time that does not depend on how much of it is right
        return hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"

    def _too_long(self, length: int) -> str:
        return f"the body has {length} bytes or more, {self._body_bytes} are allowed"


async def _refuse(send: Any, status: int, message: str) -> None:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
