"""Who has which row of the key-value memory: sequences join, leave, and move."""

from __future__ import annotations

from moe_local.offload.engine.kv_rows import KVRows
from moe_local.offload.engine.prefix import in_common, row_to_go_on
from moe_local.offload.engine.sampling import Settings
from moe_local.offload.engine.saved_row import SavedRow
from moe_local.offload.engine.sequence import Sequence
from moe_local.offload.engine.shelf import Shelf


class Rows:
    """The sequences of `kv`, by row. Those that have left stay parked in their rows until these are needed,
    and then go to `shelf`.

    A sequence is parked if it has a number in `departure`, and active if not; that is kept nowhere else.
    """

    def __init__(self, kv: KVRows, shelf: Shelf) -> None:
        self._kv = kv
        self._shelf = shelf
        self.members: list[Sequence] = []
        """By row, active and parked."""
        self._departures = 0

    @property
    def active(self) -> list[Sequence]:
        """By row."""
        return [sequence for sequence in self.members if sequence.departure is None]

    @property
    def parked(self) -> list[Sequence]:
        """In the order in which they left."""
        left = [(s.departure, s) for s in self.members if s.departure is not None]
        return [sequence for _, sequence in sorted(left, key=lambda pair: pair[0])]

    @property
    def free(self) -> int:
        """How many sequences can join."""
        return self._kv.rows - len(self.active)

    def join(self, ids: list[int], settings: Settings, *, reuse: bool) -> Sequence:
        """Give a prompt a row, while one is free. With `reuse`, `row_to_go_on` chooses it.

        If that raises, no sequence has joined; a parked one may be gone, or its row empty.
        """
        shared, parked = row_to_go_on(self._kv, self.parked, ids) if reuse else (0, None)
        found, saved = self._shelf.find(ids, shared) if reuse else (0, None)
        if saved is not None:
            shared, parked = found, None
        parts_at = 0
        if reuse and self._kv.needs_snapshots:
            parts_at = max((in_common(self._kv, other, ids) for other in self.members), default=0)
        if parked is not None:
            self._shelf.put(parked, shared)
            row = parked.row
            self._kv.shorten(row, shared)
            sequence = self.members[row] = Sequence(ids, len(ids), settings, row, reused_tokens=shared)
        else:
            if len(self.members) == self._kv.rows:
                self._shelf.put(self.parked[0], 0, saved)
                self._give_up(self.parked[0])
            sequence = Sequence(ids, len(ids), settings, self._join(saved, shared), reused_tokens=shared)
            self.members.append(sequence)
        sequence.shares, sequence.parts_at = reuse, parts_at
        return sequence

    def leave(self, sequence: Sequence) -> None:
        """Park an active sequence."""
        assert self.members[sequence.row] is sequence, "this sequence has left before"
        assert sequence.departure is None, "this sequence has left before"
        self._departures += 1
        sequence.departure = self._departures

    def forget(self) -> None:
        """Free the rows of all parked sequences, and the shelf."""
        self._shelf.clear()
        for parked in self.parked:
            self._give_up(parked)

    def _join(self, saved: SavedRow | None, length: int) -> int:
        """The next row of the memory, empty or with so many tokens of a saved one."""
        row = self._kv.join()
        if saved is not None:
            try:
                self._kv.load(row, saved, length)
            except BaseException:
                self._kv.leave(row)
                raise
        return row

    def _give_up(self, parked: Sequence) -> None:
        self._kv.leave(parked.row)  # first: where it raises, the sequence stays parked
        last = self.members.pop()
        if last is not parked:
            self.members[parked.row] = last
            last.row = parked.row

    def to_front(self, sequences: list[Sequence]) -> list[Sequence]:
        """Move these sequences, which are ordered by row, to the first rows: a batch is rows 0 to n - 1.

        Rows move only when a sequence joins or leaves the batch, not at every step. If that raises, two rows
        may be empty, whose sequences are then computed again from their ids.
        """
        members, count = self.members, len(sequences)
        outside = [row for row in range(count) if members[row] not in sequences]
        behind = [sequence.row for sequence in sequences if sequence.row >= count]
        for hole, row in zip(outside, behind, strict=True):
            self._kv.swap(hole, row)
            members[hole], members[row] = members[row], members[hole]
            members[hole].row, members[row].row = hole, row
        return members[:count]

    def check_integrity(self) -> None:
        """Raises AssertionError when the bookkeeping contradicts itself."""
        kv = self._kv
        kv.check_integrity()
        assert len(self.members) == len(kv.lens)
        for row, sequence in enumerate(self.members):
            assert sequence.row == row
            assert kv.lens[row] < len(sequence.ids) or sequence.departure is not None
            assert sequence.prompt_len <= len(sequence.ids) <= kv.capacity + 1
