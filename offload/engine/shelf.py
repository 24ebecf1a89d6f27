"""Conversations whose rows were needed for others, kept in RAM that the plan has left over.

An agent's small requests in between, such as one for a title, would otherwise cost it the row of a
conversation of many thousand tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Ids
from typing import NamedTuple

from moe_local.cache.errors import first_line
from moe_local.offload.engine.kv_rows import KVRows
from moe_local.offload.engine.prefix import GENERATION_PROMPT, ids_in_common
from moe_local.offload.engine.saved_row import SavedRow
from moe_local.offload.engine.sequence import Sequence
from moe_local.offload.plan.free_memory import free_ram

logger = logging.getLogger(__name__)

WORTH_SHELVING = 256
"""Fewest tokens of a prompt to save by a copy; fewer are soon computed."""

COPIED = 16
"""How many tokens are copied in the time that computes one, at least."""


class Shelved(NamedTuple):
    """What a sequence's row held."""

    ids: list[int]
    prompt_len: int
    saved: SavedRow


class Shelf:
    """Up to `budget` bytes of rows. Those neither put nor found for the longest time give way."""

    def __init__(self, kv: KVRows, budget: int) -> None:
        self._kv = kv
        self._budget = budget if kv.can_copy else 0
        self._shelved: list[Shelved] = []
        """From the one used longest ago to the last."""

    def put(self, parked: Sequence, keeps: int, needed: SavedRow | None = None) -> None:
        """Shelve a parked sequence whose row is about to lose all but its first `keeps` tokens.

        `needed`, which was found before and is still to be read, does not give way. Nothing is shelved
        without memory for a copy, nor for the sake of an answer alone, which the next turn may have without
        its thought.
        """
        if not (self._budget and parked.shares):
            return
        length = self._kv.lens[parked.row]
        held = min(length, parked.prompt_len)
        if not _worth_a_copy(held - keeps, length):
            return
        nbytes, kept = self._kv.saved_bytes(parked.row), 0 if needed is None else needed.nbytes
        if nbytes > min(self._budget - kept, free_ram() + self.nbytes - kept):
            return
        self._shelved = [
            each for each in self._shelved if each.saved is needed or not _goes_on(parked.ids[:held], each)
        ]
        while nbytes > min(self._budget - self.nbytes, free_ram()):
            if not self._shelved or self._shelved[0].saved is needed:
                return
            self._shelved.pop(0)
        try:
            saved = self._kv.save(parked.row)
        except (MemoryError, RuntimeError) as error:  # torch raises the latter
            logger.warning("a conversation is not kept: %s", first_line(error))
            return
        self._shelved.append(Shelved(parked.ids[:], parked.prompt_len, saved))

    def find(self, ids: Ids[int], least: int) -> tuple[int, SavedRow | None]:
        """(how many first tokens of a prompt the best of all can give, itself); (0, None) if these are not so
        many more than `least` that a copy is worth it."""
        best, found = least, None
        for each in self._shelved:
            shared = each.saved.reusable(ids_in_common(each.ids, ids, min(each.saved.length, len(ids) - 1)))
            if shared > best:
                best, found = shared, each
        if found is None or not _worth_a_copy(best - least, best):
            return 0, None
        self._shelved.remove(found)
        self._shelved.append(found)
        return best, found.saved

    def clear(self) -> None:
        self._shelved = []

    @property
    def nbytes(self) -> int:
        return sum(each.saved.nbytes for each in self._shelved)


def _worth_a_copy(saves: int, copied: int) -> bool:
    """Whether not having to compute some tokens is worth copying others."""
    return saves >= max(WORTH_SHELVING, copied // COPIED)


def _goes_on(ids: Ids[int], shelved: Shelved) -> bool:
    """Whether the tokens of a row are those of a later turn of a shelved conversation."""
    before = shelved.prompt_len - GENERATION_PROMPT
    return ids[:before] == shelved.ids[:before]
