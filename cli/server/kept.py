"""Responses that are kept, so that a client need not send a whole conversation again to go on with it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_local.cli.server.failures import Failure
from moe_local.cli.server.input_items import named
from moe_local.cli.server.items import Item

MOST = 256
"""Responses."""
MOST_BYTES = 64 << 20
"""As JSON, each with all of its conversation."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A response, with the items of its conversation up to its own output, which all have ids.

    What it shares with earlier ones is counted with each.
    """

    response: dict[str, Any]
    items: list[Item]
    nbytes: int

    @property
    def asked(self) -> list[Item]:
        """The items that it was made from."""
        return self.items[: len(self.items) - len(self.response["output"])]


class KeptResponses:
    """In memory, the last used ones; they end with the server. Lives in the event loop."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._nbytes = 0

    def add(self, response: dict[str, Any], asked: Sequence[Item], earlier: Kept | None) -> None:
        """`asked`: the items that were sent, behind those of `earlier`."""
        asked = [named(item) for item in asked]
        items = [*(earlier.items if earlier else ()), *asked, *response["output"]]
        nbytes = len(json.dumps(response)) + len(json.dumps(asked)) + (earlier.nbytes if earlier else 0)
        self._kept[response["id"]] = Kept(response, items, nbytes)
        self._nbytes += nbytes
        while len(self._kept) > self._most or self._nbytes > self._most_bytes:
            self._nbytes -= self._kept.popitem(last=False)[1].nbytes

    def find(self, name: str) -> Kept | None:
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def before(self, name: str | None) -> Kept | None:
        """What a `previous_response_id` names. Raises Failure where it is not kept."""
        found = None if name is None else self.find(name)
        if name is not None and found is None:
            raise Failure(
                400,
                f"no response {name!r} is kept here (any more); send the whole conversation as input",
                "invalid_request_error",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return found

    def get(self, name: str) -> Kept:
        """Raises Failure where it is not kept."""
        found = self.find(name)
        if found is None:
            raise Failure(
                404,
                f"no response {name!r} is kept here (any more)",
                "invalid_request_error",
                param="response_id",
            )
        return found

    def remove(self, name: str) -> None:
        """Raises Failure where it is not kept."""
        self.get(name)
        self._nbytes -= self._kept.pop(name).nbytes
