"""Eviction for a lower tier, which preferably keeps experts that the tier above does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from moe_local.cache.policies import policy_for
from moe_local.cache.policy import EvictionPolicy

if TYPE_CHECKING:
    from moe_local.cache.expert_cache import ExpertCache

LEAVING = 0.5
"""Share of the upper tier's experts, those next to be evicted, whose copies below are not preferred
for eviction: an eviction above drops the bytes, and then the copy below is the only one in memory."""

COLD = 0.5
"""Share of the lower tier's experts, the coldest, among which copies go before others. If it were all
of them, the next read would evict each copy, and older experts would stay for ever: best while a topic lasts,
worse than keeping all copies once it changes (docs/log.md)."""


class Beside:
    """Makes the policies of one tier's layers, by name, with the tier above in mind.

    An expert that the tier above holds is read there, so its copy takes the slot of another expert, which
    then has to come from disk. So among the coldest experts below, copies of what the tier above will not
    evict soon are evicted first, then all others in the policy's order.
    """

    def __init__(self, policy: str, layers: int) -> None:
        """Raises OptionError for an unknown policy. Until `above` is set, the policy alone decides."""
        self.above: ExpertCache | None = None
        self._policy = policy
        self._layers = layers
        self._made = count()
        self._make = policy_for(policy)

    def __call__(self) -> EvictionPolicy:
        """The policy of the next layer, in ascending order; after the last one again of the first."""
        layer = next(self._made) % self._layers
        if layer == 0:
            self._make = policy_for(self._policy)  # policies made by one factory may share state
        return _Beside(self._make(), lambda: self._safe(layer))

    def _safe(self, layer: int) -> set[int]:
        """The layer's experts that the tier above will not evict soon."""
        if self.above is None:
            return set()
        order = self.above.coldest(layer)
        return {*order[int(LEAVING * len(order)) :]}


class _Beside:
    """A policy that first evicts cold experts that are safe in the tier above."""

    __slots__ = ("_policy", "_safe", "insert", "pass_over", "remove", "touch")

    def __init__(self, policy: EvictionPolicy, safe: Callable[[], set[int]]) -> None:
        self._policy = policy
        self._safe = safe
        self.touch: Callable[..., None] = policy.touch
        self.pass_over: Callable[[Sequence[int]], None] = policy.pass_over
        self.insert: Callable[[int], None] = policy.insert
        self.remove: Callable[[int], None] = policy.remove

    def coldest(self) -> Iterator[int]:
        order = [*self._policy.coldest()]
        safe = self._safe()
        copies = dict.fromkeys(expert for expert in order[: int(COLD * len(order))] if expert in safe)
        yield from copies
        yield from (expert for expert in order if expert not in copies)

    def __len__(self) -> int:
        return len(self._policy)
