"""Reuse of keys and values: finds sequences that begin with the same tokens as a new prompt."""

from __future__ import annotations

from collections.abc import Sequence as Ids

from moe_local.offload.engine.kv_rows import KVRows
from moe_local.offload.engine.sequence import Sequence

WORTH_COPYING = 16
"""Fewest tokens to copy: a few tokens of a template cost little in the forward of the rest."""

WORTH_A_SNAPSHOT = 128
"""A prompt's forward is cut for a snapshot behind this many tokens at the earliest: short ones are slow."""

GENERATION_PROMPT = 6
"""How many of a prompt's last tokens the next turn may have otherwise. Templates open an answer with a header
and perhaps a thought, as in Qwen's "assistant\\n<think>\\n\\n</think>\\n\\n". Later they write it without the
thought, or not at all if it was broken off."""


def row_to_go_on(kv: KVRows, parked: Ids[Sequence], ids: Ids[int]) -> tuple[int, Sequence | None]:
    """(how many tokens a prompt reuses, the parked sequence whose row it continues); or (0, None).

    The sequence is the one with the most tokens to reuse (the last of several), if these are at least half of
    its row. With fewer, the two may share only the template's first tokens, and the rest of the row would be
    lost: such a prompt takes an unused row or, if there is none, the row that was left longest ago.
    """
    best, found = 0, None
    for sequence in parked:
        shared = kv.reusable(sequence.row, in_common(kv, sequence, ids))
        if shared and shared >= best:
            best, found = shared, sequence
    if found is None or 2 * best >= kv.lens[found.row]:
        return best, found
    if len(kv.lens) < kv.rows:
        return 0, None
    oldest = parked[0]
    shared = kv.reusable(oldest.row, in_common(kv, oldest, ids))
    return (shared, oldest) if shared else (0, None)


def copy_prefix(kv: KVRows, others: Ids[Sequence], sequence: Sequence) -> None:
    """Copy to a row the tokens of its prompt that another row has computed, if enough to be worth it.

    So several answers to one prompt, or prompts with the same system prompt, compute it once: the first one
    computes a chunk, the next one copies that and computes the next chunk. Called before each chunk.
    """
    ids, own = sequence.ids[: sequence.prompt_len], kv.lens[sequence.row]
    if not (sequence.shares and kv.can_copy) or own >= sequence.prompt_len - 1:
        return
    best, found = own + WORTH_COPYING - 1, None
    for other in others:
        if other is sequence or kv.lens[other.row] <= best:
            continue
        shared = kv.reusable(other.row, in_common(kv, other, ids))
        if shared > best:
            best, found = shared, other
    if found is not None:
        kv.copy(found.row, sequence.row, best)
        # a failed step may have emptied the row since it joined
        sequence.reused_tokens = min(sequence.reused_tokens, own) + best - own


def until_snapshot(kv: KVRows, sequence: Sequence) -> int:
    """How many tokens a prompt's next forward takes at most, so that a snapshot can be taken after it where
    later prompts are likely to part from this one.

    That is before its last tokens, and where it has parted itself from an earlier one.
    """
    done, end = kv.lens[sequence.row], len(sequence.ids)
    if sequence.shares and kv.needs_snapshots:
        for place in sorted((sequence.parts_at, end - GENERATION_PROMPT)):
            if place >= done + WORTH_A_SNAPSHOT:
                return place - done
    return end - done


def in_common(kv: KVRows, other: Sequence, ids: Ids[int]) -> int:
    """How many of its first tokens a prompt shares with what another row holds; at least one token of the
    prompt is left to compute."""
    return ids_in_common(other.ids, ids, min(kv.lens[other.row], len(ids) - 1))


def ids_in_common(one: Ids[int], other: Ids[int], limit: int) -> int:
    """How many of their first tokens are the same, up to `limit`, which both have.

    Compares slices, since a loop over the ids of a long conversation would take milliseconds for each row.
    """
    if one[:limit] == other[:limit]:
        return limit
    same = 0  # so many are; the first different one is among the next `limit - same`
    while limit - same > 1:
        middle = (same + limit) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            limit = middle
    return same
