"""Reuse of keys and values: finds sequences that begin with the same tokens as a new prompt."""

from __future__ import annotations

from collections.abc import Sequence as Ids

from moe_local.offload.engine.kv_rows import KVRows
from moe_local.offload.engine.sequence import Sequence

WORTH_COPYING = 16
"""Fewest tokens to copy: a few tokens of a template cost little in the forward of the rest."""


def row_to_go_on(kv: KVRows, parked: Ids[Sequence], ids: Ids[int]) -> tuple[int, Sequence | None]:
    """(how many tokens a prompt reuses, the parked sequence whose row it continues); or (0, None).

    The sequence is the one with the most tokens to reuse (the last of several), if these are at least half of
    its row. With fewer, the two may share only the template's first tokens, and the rest of the row would be
    lost: such a prompt takes an unused row or, if there is none, the row that was left longest ago.
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
    """Copy to a row the tokens of its prompt that another row has computed, if enough to be worth it.

    So several answers to one prompt, or prompts with the same system prompt, compute it once: the first one
    computes a chunk, the next one copies that and computes the next chunk. Called before each chunk.
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
    """How many tokens of a row a prompt can reuse; at least one token of the prompt is left to compute."""
    row, old = parked.row, parked.ids
    limit = min(kv.lens[row], len(ids) - 1)
    shared = next((i for i in range(limit) if old[i] != ids[i]), limit)
    return shared if kv.can_shorten(row, shared) else 0
