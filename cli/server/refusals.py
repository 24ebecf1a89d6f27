"""What the framework refuses, as OpenAI's clients know it: bodies not understood, paths not there."""

from __future__ import annotations

import difflib
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from moe_local.cli.server.failures import MESSAGES, Failure
from moe_local.cli.server.message_request import CountRequest, MessageRequest
from moe_local.cli.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from moe_local.cli.server.response_request import InputTokensRequest, ResponseRequest, TextOptions

REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/v1/responses/input_tokens": InputTokensRequest,
    MESSAGES: MessageRequest,
    f"{MESSAGES}/count_tokens": CountRequest,
}
PARTS: tuple[type[BaseModel], ...] = (StreamOptions, TextOptions)
LONGEST_SHOWN = 60
"""Characters of a wrong value that an error shows."""
FIELDS = {name for kind in (*REQUESTS.values(), *PARTS) for name in kind.model_fields}


def add_to(app: FastAPI) -> None:
    app.add_exception_handler(Failure, failed)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(Exception, _broken)


async def failed(request: Request, error: Any) -> JSONResponse:
    body = error.body(request.url.path)
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def check_fields(request: Request, given: BaseModel) -> None:
    """Raises Failure for an unknown field, save for one of a beta: these come and go, and clients of
    Anthropic's, which say so, need not wait for us."""
    if given.model_extra and "anthropic-beta" not in request.headers and "beta" not in request.query_params:
        raise _unknown(request, next(iter(given.model_extra)))


def _unknown(request: Request, where: str) -> Failure:
    near = difflib.get_close_matches(where, REQUESTS[request.url.path].model_fields, 1, cutoff=0.7)
    message = f"unknown field {where!r}" + (f"; did you mean {near[0]!r}?" if near else "; leave it out")
    return Failure(400, message, "invalid_request_error", param=where)


async def _refused(request: Request, error: Any) -> JSONResponse:
    """What FastAPI refuses by itself: unknown paths and methods, bodies that are too long."""
    message = f"{request.method} {request.url.path}: {_unreadable(error.__cause__) or error.detail}"
    if error.status_code == 404:
        message += (
            f"; there are {', '.join(REQUESTS)} and /v1/models: base URLs end in /v1, Anthropic's before it"
        )
    elif error.status_code == 405 and "access-control-request-method" in request.headers:
        message += "; serve --cors ORIGIN lets web pages of another origin ask"
    elif error.status_code == 405 and (allowed := (error.headers or {}).get("Allow")):
        message += f"; use {allowed}"
    body = Failure(error.status_code, message, "invalid_request_error").body(request.url.path)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _unreadable(cause: BaseException | None) -> str | None:
    """What is wrong with a body that cannot even be looked at as JSON; None if it was not that."""
    if isinstance(cause, UnicodeDecodeError):
        byte = cause.object[cause.start]
        return f"the body is not {cause.encoding.upper()}: byte {cause.start} is 0x{byte:02x}"
    return "the body is nested too deeply" if isinstance(cause, RecursionError) else None


def _place(text: str, position: int) -> str:
    """Where in a body something is, as editors count."""
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"line {line}, column {column} (character {position})"


async def _broken(request: Request, error: Any) -> JSONResponse:
    """An error of ours; uvicorn logs it."""
    message = f"the server failed: {type(error).__name__}; its log says more"
    return await failed(request, Failure(500, message, "server_error"))


def _wrong(where: str, error: dict[str, Any]) -> str:
    """What pydantic found, with the value. `where`: the field, "" for the body itself."""
    name = where or "the body"
    match error["type"]:
        case "missing":
            return f"{name} is missing; give it" if where else "the body is empty; send a JSON object"
        case "too_short":
            return f"{name} is empty; give at least {error['ctx']['min_length']}"
        case "model_attributes_type":
            needed = "a JSON object"
        case _:
            begin, found, needed = error["msg"].partition("Input should be ")
            if begin or not found:
                return f"{name}: {error['msg']}"
    return f"{name} is {_shown(error['input'])}; it should be {needed}"


def _shown(value: Any) -> str:
    """A wrong value, as JSON if that is short."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value, default=str)  # in ASCII, since half a character cannot be sent
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


async def _not_understood(request: Request, error: Any) -> JSONResponse:
    errors = error.errors()
    # a misspelt field explains why another is missing
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "json_invalid":
        place = _place(error.body, first["loc"][-1])
        message = f"the body is not JSON: {first['ctx']['error']} at {place}"
        return await failed(request, Failure(400, message, "invalid_request_error"))
    unknown = first["type"] == "extra_forbidden"
    # of a field that takes several types, the types are parts, too
    where = ".".join(
        part
        for part in first["loc"][1:]
        if isinstance(part, str) and (unknown or part in FIELDS or first["loc"][0] != "body")
    )
    if unknown:
        return await failed(request, _unknown(request, where))
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else _wrong(where, first)
    return await failed(request, Failure(400, message, "invalid_request_error", param=where or None))
