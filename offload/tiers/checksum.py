"""The checksum of an expert that is still being read: taken part by part, as parts arrive in any order."""

from __future__ import annotations

import xxhash


class RunningChecksum:
    """xxh3_64 of a buffer, of what has arrived from its start on without a gap.

    Once an expert has been read, only its last part is left to be hashed, a fraction of the milliseconds
    that all of it would. Nothing here locks: the caller sees to it that one thread at a time calls what there
    is; only `add` may run beside the others.
    """

    def __init__(self, buffer: memoryview) -> None:
        """`buffer` is exactly what is to be hashed; its owner keeps it until nobody hashes any more."""
        self._buffer = buffer
        self._hash = xxhash.xxh3_64()
        self._ends: dict[int, int] = {}
        """Start -> end of parts that arrived and were not claimed yet."""
        self._end = 0
        self.busy = False
        """Whether a part has been claimed and not been added yet."""

    @property
    def complete(self) -> bool:
        return self._end == len(self._buffer) and not self.busy

    def arrived(self, start: int, nbytes: int) -> None:
        """These bytes of the buffer are final."""
        self._ends[start] = start + nbytes

    def claim(self) -> memoryview | None:
        """The next part to `add`; None if it has not arrived, or somebody else is adding one."""
        if self.busy or self._end not in self._ends:
            return None
        start = self._end
        while self._end in self._ends:
            self._end = self._ends.pop(self._end)
        self.busy = True
        return self._buffer[start : self._end]

    def add(self, part: memoryview) -> None:
        """Hash what was claimed. Other Python threads run meanwhile."""
        self._hash.update(part)

    def added(self) -> None:
        """The part that was claimed has been added."""
        self.busy = False

    def digest(self) -> int:
        """Of what has been added."""
        return self._hash.intdigest()
