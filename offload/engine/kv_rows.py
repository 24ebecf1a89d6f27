"""The memory of sequences as the engine uses it, whatever a model's layers keep."""

from __future__ import annotations

from typing import Any, Protocol

from moe_local.offload.engine.batch_view import BatchPlaces
from moe_local.offload.engine.saved_row import SavedRow


class KVRows(Protocol):
    """The protocol of the memory of sequences, as the engine uses it.

    The first `lens[row]` tokens of a row are valid. A forward through `row(r)` writes after them and changes
    no length; `advance` makes the new tokens valid, `abort` drops them. Rows in use are 0 to len(lens) - 1.
    """

    rows: int
    capacity: int
    lens: list[int]
    can_batch: bool
    """Whether several rows can take part in one forward, one new token each."""
    can_copy: bool
    """Whether the first tokens of a row can be copied to another."""
    needs_snapshots: bool
    """Whether rows can be cut only to where a snapshot was taken, and to nothing."""
    whole_prompt_only: bool
    """Whether a prompt must be computed in one forward, and later tokens one by one."""
    places: BatchPlaces
    """Where the tokens of the last `batch` are written."""
    windows: list[int | None]
    """For each layer, how many tokens its attention sees; None: all, or the layer has no attention."""

    def join(self) -> int:
        """Take the next row, empty. Call only while len(lens) < rows."""

    def leave(self, row: int) -> None:
        """Free a row. The last row takes its place, and has the number `row` from now on.

        If that raises, all rows stay in use, and this one is empty.
        """

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows in use. If that raises, both are empty."""

    def row(self, row: int) -> Any:
        """A transformers Cache of one sequence, for one forward of any number of tokens that fit."""

    def batch(self, count: int) -> Any:
        """A Cache of rows 0 to count - 1, for one forward of one token each, with masks made of `places`.

        Call only when `can_batch`.
        """

    def advance(self, row: int, tokens: int) -> None:
        """Make the new tokens of a finished forward through the row valid."""

    def abort(self, row: int) -> None:
        """Drop the tokens of a failed forward through the row. `lens[row]` may be less afterwards, even 0."""

    def snapshot(self, row: int) -> None:
        """Let the row be cut to its present length later, for as long as memory for snapshots suffices."""

    def chunk(self, row: int, todo: int, wanted: int) -> int:
        """How many of `todo` new tokens the next forward of this row takes: `wanted`, where possible."""

    def reusable(self, row: int, length: int) -> int:
        """To how many tokens the row can be cut and then continued, if only its first `length`, of those it
        has, are wanted."""

    def shorten(self, row: int, length: int) -> None:
        """Drop the tokens from `length` on, which is 0 or a result of `reusable`. If that raises, the row is
        empty."""

    def copy(self, one: int, other: int, length: int) -> None:
        """Copy tokens of row `one` to row `other`, so that it has the first `length` of them; it has fewer
        before, the same ones. Call only if `can_copy`, with a result of `reusable`. If that raises, the other
        row has as many as before, or fewer."""

    def saved_bytes(self, row: int) -> int:
        """Bytes of what `save` returns."""

    def save(self, row: int) -> SavedRow:
        """A copy of the row in RAM. Call only if `can_copy`."""

    def load(self, row: int, saved: SavedRow, length: int) -> None:
        """Copy to an empty row the first `length` tokens of a saved one, a result of its `reusable`. If that
        raises, the row is still empty."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, used or not."""

    def check_integrity(self) -> None:
        """Raises AssertionError when the bookkeeping contradicts itself."""
