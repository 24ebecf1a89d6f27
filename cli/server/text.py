"""What only clients ask of an answer's text: to end before a string, and names for tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from moe_local.cli.answer_parser import overlap


class StopFilter:
    """Lets text through up to the first stop string, which it holds back: clients don't want to see it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What of the text so far can be shown and has not been."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
