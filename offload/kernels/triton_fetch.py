"""Two Triton kernels by which the GPU looks up a layer's experts and fetches absent ones, before the grouped
ones.

Imports Triton, so import this module only if it is installed. `fetch.py` launches the kernels.

All tables are int64, on the device. A layer has E experts, S slots, and K chosen experts per token.
  ids [K]         the router's choice, distinct
  slot_of [E]     the slot that an expert is in, or -1
  expert_in [S]   the expert that is in a slot, or -1
  used [S]        the number of the token that last used a slot
  offsets [S]     where a slot starts, in UNITs from the layer's first slot
  sources [E]     where an expert starts in RAM, in bytes from the start of the memory
  order [1 + V]   the last token that the host knew of when it made the list, then slots to fill, in this
                  order, padded with -1
  clock [1]       the number of this token
  log [4 + 2 K]   what happened: the token, when copies began and ended (ns), an unused number, the ids, and
                  for each of them the slot that it was fetched into, or -1
  found [K, 2]    a Launcher's table: where each expert starts, as in offsets, and its rank

The list holds at least min(S, 3 K) slots. So at least K remain besides those that this token uses and those
that other tokens may have used since the list was made; the latter are filled only if nothing else is left.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def look_up_kernel(
    ids,
    slot_of,
    expert_in,
    used,
    offsets,
    order,
    clock,
    log,
    found,
    TOP_K: tl.constexpr,
    LISTED: tl.constexpr,
    RANKS: tl.constexpr,
    PLACES: tl.constexpr,
    BEGINS: tl.constexpr,
    TIMED: tl.constexpr,
):
    """Finds slots for a token's experts: those that they are in, or slots to fetch them into.

    Runs as one program of one warp. RANKS and PLACES are TOP_K and LISTED, rounded up to powers of two.
    BEGINS: this is the token's first layer, which increments the clock.
    """
    rank = tl.arange(0, RANKS)
    chosen = rank < TOP_K
    expert = tl.load(ids + rank, mask=chosen, other=0)
    there = tl.load(slot_of + expert, mask=chosen, other=0)
    absent = chosen & (there < 0)
    now = tl.load(clock)
    if BEGINS:
        now += 1
    known = tl.load(order)
    place = tl.arange(0, PLACES)
    slot = tl.load(order + 1 + place, mask=place < LISTED, other=-1)
    last = tl.load(used + slot, mask=slot >= 0, other=0)
    leaving = tl.load(expert_in + slot, mask=slot >= 0, other=-1)
    mine = (slot[:, None] == there[None, :]) & (chosen & (there >= 0))[None, :]
    open_ = (slot >= 0) & (tl.sum(mine.to(tl.int32), axis=1) == 0)
    first = (open_ & (last <= known)).to(tl.int32)
    later = (open_ & (last > known)).to(tl.int32)
    turn = tl.where(first > 0, tl.cumsum(first, axis=0), tl.sum(first, axis=0) + tl.cumsum(later, axis=0))
    need = tl.cumsum(absent.to(tl.int32), axis=0)
    fill = (turn[:, None] == need[None, :]) & open_[:, None] & absent[None, :]
    filled = tl.sum(tl.where(fill, slot[:, None], 0), axis=0)
    gone = tl.sum(fill.to(tl.int32), axis=1) > 0
    # The stores below overwrite what other threads read above.
    tl.debug_barrier()
    tl.store(slot_of + leaving, tl.full([PLACES], -1, tl.int64), mask=gone & (leaving >= 0))
    tl.store(slot_of + expert, filled, mask=absent)
    tl.store(expert_in + filled, expert, mask=absent)
    where = tl.where(absent, filled, there)
    tl.store(used + where, now + tl.zeros([RANKS], tl.int64), mask=chosen)
    if BEGINS:
        tl.store(clock, now)
    tl.store(found + 2 * rank, tl.load(offsets + where, mask=chosen, other=0), mask=chosen)
    tl.store(found + 2 * rank + 1, rank.to(tl.int64), mask=chosen)
    tl.store(log, now)
    tl.store(log + 4 + rank, expert, mask=chosen)
    tl.store(log + 4 + TOP_K + rank, tl.where(absent, filled, -1), mask=chosen)
    if TIMED:
        began = cuda.globaltimer()
        tl.store(log + 1, began)
        tl.store(log + 2, began)


@triton.jit
def fetch_kernel(
    memory,
    base,
    offsets,
    sources,
    log,
    TOP_K: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TIMED: tl.constexpr,
):
    """Copies experts that the log says were absent from `memory`, in RAM, to their slots after `base`.

    Grid (PROGRAMS, K). An expert has WORDS words of 4 bytes. A thread has four 16-byte loads in flight at a
    time; the number of loads in flight over all programs is what saturates the link.
    """
    rank = tl.program_id(1)
    slot = tl.load(log + 4 + TOP_K + rank)
    if slot >= 0:
        start = tl.multiple_of(tl.load(sources + tl.load(log + 4 + rank)), 16)
        source = (memory + start).to(tl.pointer_type(tl.int32))
        target = (base + tl.load(offsets + slot) * UNIT).to(tl.pointer_type(tl.int32))
        word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        for first in range(0, WORDS, BLOCK * PROGRAMS):
            at = first + word
            inside = at < WORDS
            tl.store(
                target + at, tl.load(source + at, mask=inside, eviction_policy="evict_first"), mask=inside
            )
        if TIMED:
            tl.debug_barrier()
            tl.atomic_max(log + 2, cuda.globaltimer())
