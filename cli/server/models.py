"""The model under each of its names, as OpenAI's clients and as Anthropic's know models."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import Request

from moe_local.cli.server.failures import Failure

ANTHROPIC = "anthropic-version"
"""A header that all of Anthropic's clients send."""


class Models:
    """There is one, which may have several names."""

    def __init__(self, names: Sequence[str], created: int, context: int) -> None:
        """`created`: in seconds since 1970. `context`: in tokens."""
        self._names = names
        self._created = created
        self._context = context

    async def all(self, request: Request) -> dict[str, Any]:
        if ANTHROPIC not in request.headers:
            return {"object": "list", "data": [self._openais(name) for name in self._names]}
        return {
            "data": [self._anthropics(name) for name in self._names],
            "has_more": False,
            "first_id": self._names[0],
            "last_id": self._names[-1],
        }

    async def one(self, name: str, request: Request) -> dict[str, Any]:
        self.check(name)
        return self._anthropics(name) if ANTHROPIC in request.headers else self._openais(name)

    def check(self, name: str | None) -> None:
        """Raises Failure for a name that the model does not go by; none is right."""
        if name not in (None, "", *self._names):
            raise Failure(
                404,
                f"no model {name!r} here; this server has {self._names[0]!r} (serve --alias adds names)",
                "invalid_request_error",
                param="model",
                code="model_not_found",
            )

    def _openais(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "moe-local",
            "context_length": self._context,
        }

    def _anthropics(self, name: str) -> dict[str, Any]:
        created = datetime.fromtimestamp(self._created, UTC).isoformat().replace("+00:00", "Z")
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": created,
            "lifecycle": "active",
            "max_input_tokens": self._context,
            "max_tokens": self._context,
        }
