"""Reconstructs when the link and the CPU were busy, from times measured on the host and on the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple


class Span(NamedTuple):
    start: float
    end: float

    def overlap(self, other: Span) -> float:
        """Seconds that both spans cover."""
        return max(0.0, min(self.end, other.end) - max(self.start, other.start))


class _Copy(NamedTuple):
    key: Hashable
    nbytes: int
    issued: float


class Timeline:
    """The spans of copies, which run one after the other as issued, and of CPU work, in the host's clock.

    The host knows when it issued a copy, and the device how long it ran; a copy began when it had been
    issued and the previous copy had ended. Copies that have not ended are assumed to take the seconds that
    `expected` gives for their bytes.
    """

    def __init__(
        self, expected: Callable[[int], float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        self._expected = expected
        self._pending: deque[_Copy] = deque()
        self._free_at = 0.0
        """When the latest of the copies that have ended did so."""
        self._copies: deque[Span] = deque(maxlen=32)
        self._computed: deque[Span] = deque(maxlen=32)

    def issued(self, key: Hashable, nbytes: int) -> None:
        """A copy is issued now."""
        self._pending.append(_Copy(key, nbytes, self.clock()))

    def ended(self, key: Hashable, seconds: float) -> Span:
        """A copy that ran for `seconds` has ended. Returns its span."""
        copy = next(copy for copy in self._pending if copy.key == key)
        self._pending.remove(copy)
        start = max(copy.issued, self._free_at)
        self._free_at = min(start + seconds, self.clock())
        self._copies.append(Span(self._free_at - seconds, self._free_at))
        return self._copies[-1]

    def computed(self, span: Span) -> None:
        """The CPU computed experts during this span."""
        self._computed.append(span)

    def queue_seconds(self) -> float:
        """Seconds from now in which the link will be busy with the copies issued so far."""
        return max(self.arrivals().values(), default=0.0)

    def arrivals(self) -> dict[Hashable, float]:
        """Seconds from now until the end of each copy in flight; 0 where that is overdue."""
        now = self.clock()
        return {copy.key: max(0.0, span.end - now) for copy, span in self._in_flight()}

    def link_beside(self, span: Span) -> float:
        """Seconds of a span of CPU work, now over, in which the link was busy."""
        busy = _covered(span, self._copies)
        for copy, expected in self._in_flight():
            late = copy is self._pending[-1]  # it has not ended yet, whatever was expected
            end = max(expected.end, span.end) if late else expected.end
            busy += span.overlap(Span(expected.start, end))
        return min(busy, span.end - span.start)

    def _in_flight(self) -> Iterator[tuple[_Copy, Span]]:
        """The copies in flight, in the order of issue, each with the span that it is expected to have."""
        at = self._free_at
        for copy in self._pending:
            start = max(at, copy.issued)
            at = start + self._expected(copy.nbytes)
            yield copy, Span(start, at)

    def cpu_beside(self, span: Span) -> float:
        """Seconds of a copy's span in which the CPU computed experts."""
        return _covered(span, self._computed)


def _covered(span: Span, others: deque[Span]) -> float:
    """Seconds of `span` that `others` cover; these are in the order in which they ended."""
    seconds = 0.0
    for other in reversed(others):
        if other.end <= span.start:
            break
        seconds += span.overlap(other)
    return seconds
