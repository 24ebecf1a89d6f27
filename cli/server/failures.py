"""Errors as OpenAI's clients know them, and on Anthropic's paths Anthropic's."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException

from moe_local.cache.errors import BusyError, ContextLengthError, MoeLocalError, OptionError

RETRY_SECONDS = 5
"""When it is worth trying again, for who is told that there is no room or no more."""
MESSAGES = "/v1/messages"
"""Anthropic's paths begin so."""
ANTHROPICS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
"""Anthropic's words for errors; others are of an "invalid_request_error"."""
TOO_LONG = "context_length_exceeded"
Headers = list[tuple[bytes, bytes]]


class Failure(Exception):
    """An error for the client. `kind` and `code` are OpenAI's words for it, `param` the field at fault.

    Clients look at the code where they can do something about an error: shorten a conversation, say.
    """

    def __init__(
        self, status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self._kind, self._param, self._code = kind, param, code

    @classmethod
    def of(cls, error: MoeLocalError) -> Failure:
        if isinstance(error, BusyError):
            return cls(429, str(error), "rate_limit_error")
        if isinstance(error, ContextLengthError):
            return cls(400, str(error), "invalid_request_error", code=TOO_LONG)
        if isinstance(error, OptionError):
            return cls(400, str(error), "invalid_request_error")
        return cls(500, str(error), "server_error")

    def body(self, path: str = "") -> dict[str, Any]:
        """As JSON, for a client that has asked for `path`."""
        message = str(self)
        if not path.startswith(MESSAGES):
            told = {"message": message, "type": self._kind, "param": self._param, "code": self._code}
            return {"error": told}
        if self._code == TOO_LONG:  # there is no code for it: agents shorten a conversation at these words
            message = f"prompt is too long: {message}"
        kind = ANTHROPICS.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}


def raw(status: int, message: str, kind: str, path: str) -> tuple[Headers, bytes]:
    """Head and body of an error that is sent without a framework; the connection closes behind a 503."""
    body = json.dumps(Failure(status, message, kind).body(path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (400, 408, 503):
        headers.append((b"connection", b"close"))
    if status == 503:
        headers.append((b"retry-after", str(RETRY_SECONDS).encode()))
    return headers, body


async def send_raw(scope: Any, send: Any, status: int, message: str, kind: str) -> None:
    """The same as an ASGI response."""
    headers, body = raw(status, message, kind, scope["path"])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class BodyTooLong(HTTPException):
    """Raised while a body is read, through whoever reads it."""

    def __init__(self, length: int, most: int) -> None:
        super().__init__(413, f"the body has {length} bytes or more, {most} are allowed")
