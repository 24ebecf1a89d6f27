"""What a new prompt has in common with sequences whose keys and values are still there."""

from __future__ import annotations

from collections.abc import Sequence as Ids

from moe_local.offload.engine.kv_slab import KVRows
from moe_local.offload.engine.sequence import Sequence

WORTH_COPYING = 16
"""Tokens; a few of a template are computed in the same forward as the rest anyway."""


def row_to_go_on(kv: KVRows, parked: Ids[Sequence], ids: Ids[int]) -> tuple[int, Sequence | None]:
    """How many tokens a prompt takes over, and the parked sequence whose row it goes on in; or (0, None).

    That is the sequence with the most tokens to take over, the last of several, if these are at least half
    of what its row holds. With fewer, the two may share no more than the template's first tokens, and the
    rest of the row would be lost: such a prompt takes a row that was never used or, if there is none, the
    row left longest ago.
    """
    best, found = 0, None
    for sequence in parked:
        shared = shared_prefix(kv, sequence, ids)
        if shared and shared >= best:
            best, found = shared, sequence
    if found is None or 2 * best >= kv.lens[found.row]:
        return best, found
    if len(kv.lens) < kv.rows:
        return 0, None
    oldest = parked[0]
    shared = shared_prefix(kv, oldest, ids)
    return (shared, oldest) if shared else (0, None)


def copy_prefix(kv: KVRows, others: Ids[Sequence], sequence: Sequence) -> None:
    """Give a row what another one has of its prompt beyond its own, if that is enough to be worth it.

    So several answers to one prompt, and many with one system prompt, compute it once: who comes first
    computes a chunk, the next one copies it and computes the next. Called for each before its turn.
    """
    ids, own = sequence.ids, kv.lens[sequence.row]
    if not (sequence.shares and kv.can_copy) or own >= sequence.prompt_len - 1:
        return
    best, found = own + WORTH_COPYING - 1, None
    for other in others:
        limit = min(kv.lens[other.row], sequence.prompt_len - 1)
        if other is sequence or limit <= best:
            continue
        if other.ids[:limit] != ids[:limit]:
            limit = next(i for i in range(limit) if other.ids[i] != ids[i])
        if limit > best:
            best, found = limit, other
    if found is not None:
        kv.copy(found.row, sequence.row, best)
        sequence.reused_tokens += best - own


def shared_prefix(kv: KVRows, parked: Sequence, ids: Ids[int]) -> int:
    """Tokens of a row that a prompt can take over; at least one is left to compute."""
    row, old = parked.row, parked.ids
    limit = min(kv.lens[row], len(ids) - 1)
    shared = next((i for i in range(limit) if old[i] != ids[i]), limit)
    return shared if kv.can_shorten(row, shared) else 0
