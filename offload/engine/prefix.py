"""What a new prompt has in common with sequences whose keys and values are still there."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ids

from moe_local.offload.engine.kv_slab import KVRows
from moe_local.offload.engine.sequence import Sequence


def longest_prefix(kv: KVRows, parked: Iterable[Sequence], ids: Ids[int]) -> tuple[int, Sequence | None]:
    """The sequence that most of a prompt can be taken over from, the last of several, and how many tokens."""
    found: tuple[int, Sequence | None] = (0, None)
    for sequence in parked:
        shared = shared_prefix(kv, sequence, ids)
        if shared and shared >= found[0]:
            found = (shared, sequence)
    return found


def shared_prefix(kv: KVRows, parked: Sequence, ids: Ids[int]) -> int:
    """Tokens of a row that a prompt can take over; at least one is left to compute."""
    row, old = parked.row, parked.ids
    limit = min(kv.lens[row], len(ids) - 1)
    shared = next((i for i in range(limit) if old[i] != ids[i]), limit)
    return shared if kv.can_shorten(row, shared) else 0
