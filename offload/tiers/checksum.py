"""The checksum of an expert that is still being read, whose parts arrive in any order."""

from __future__ import annotations

import xxhash


class RunningChecksum:
    """xxh3_64 of a buffer, over the part from its start that has arrived without a gap.

    When the last part has been read, only that is left to hash, a fraction of the milliseconds that hashing
    all of it would take. Nothing here locks: the caller ensures that one thread at a time calls a method, but
    `add` may run concurrently with the others.
    """

    def __init__(self, buffer: memoryview) -> None:
        """`buffer` holds exactly the bytes to hash; its owner keeps it alive until hashing has ended."""
        self._buffer = buffer
        self._hash = xxhash.xxh3_64()
        self._ends: dict[int, int] = {}
        """Start -> end of parts that have arrived but were not claimed yet."""
        self._end = 0
        self.busy = False
        """Whether a part has been claimed but not added yet."""

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
        """Hash the claimed part. Releases the GIL."""
        self._hash.update(part)

    def added(self) -> None:
        """The part that was claimed has been added."""
        self.busy = False

    def digest(self) -> int:
        """The checksum of all that has been added."""
        return self._hash.intdigest()
