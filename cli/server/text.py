"""What only clients ask of an answer's text: to end before a string."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from moe_local.offload.answer_format.piece import overlap


class StopFilter:
    """Lets text through up to the first stop string, which it holds back: clients don't want to see it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stop: str | None = None
        """The one that has come."""

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    def add(self, text: str) -> str:
        """What of the text so far can be shown and has not been."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stop = min(found, key=itemgetter(0))
            shown, self._held = self._held[:at], ""
            return shown
        keep = overlap(self._held, *self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown
