"""Conversations whose rows were needed for others, kept in RAM that the plan has left over.

An agent's small requests in between, such as one for a title, would otherwise cost it the row of a
conversation of many thousand tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import NamedTuple

from moe_local.offload.engine.kv_rows import KVRows
from moe_local.offload.engine.prefix import GENERATION_PROMPT, ids_in_common
from moe_local.offload.engine.saved_row import SavedRow
from moe_local.offload.engine.sequence import Sequence
from moe_local.offload.plan.free_memory import free_ram

WORTH_SHELVING = 256
"""Fewest tokens of a prompt to shelve, or to take back; fewer are soon computed."""


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

    def put(self, parked: Sequence, keeps: int) -> None:
        """Shelve a parked sequence whose row is about to lose all but its first `keeps` tokens.

        Not for the sake of its answer alone, which the next turn may have without its thought.
        """
        if not (self._budget and parked.shares):
            return
        held = min(self._kv.lens[parked.row], parked.prompt_len)
        nbytes = self._kv.saved_bytes(parked.row)
        if held - keeps < WORTH_SHELVING or nbytes > min(self._budget, free_ram() + self.nbytes):
            return
        self._shelved = [each for each in self._shelved if not _goes_on(parked, each)]
        while nbytes > min(self._budget - self.nbytes, free_ram()) and self._shelved:
            self._shelved.pop(0)
        self._shelved.append(Shelved(parked.ids[:], parked.prompt_len, self._kv.save(parked.row)))

    def find(self, ids: Ids[int], least: int) -> tuple[int, SavedRow | None]:
        """(how many first tokens of a prompt the best of all can give, itself); (0, None) if these are not
        WORTH_SHELVING more than `least`."""
        best, found = least + WORTH_SHELVING - 1, None
        for each in self._shelved:
            shared = each.saved.reusable(ids_in_common(each.ids, ids, min(each.saved.length, len(ids) - 1)))
            if shared > best:
                best, found = shared, each
        if found is None:
            return 0, None
        self._shelved.remove(found)
        self._shelved.append(found)
        return best, found.saved

    def clear(self) -> None:
        self._shelved = []

    @property
    def nbytes(self) -> int:
        return sum(each.saved.nbytes for each in self._shelved)


def _goes_on(parked: Sequence, shelved: Shelved) -> bool:
    """Whether a sequence is a later turn of a shelved conversation."""
    before = shelved.prompt_len - GENERATION_PROMPT
    return parked.ids[:before] == shelved.ids[:before]
