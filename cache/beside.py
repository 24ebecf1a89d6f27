"""What a tier keeps below another one: preferably what the tier above does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from moe_local.cache.policies import policy_for
from moe_local.cache.policy import EvictionPolicy

if TYPE_CHECKING:
    from moe_local.cache.expert_cache import ExpertCache

LEAVING = 0.5
"""Share of the experts above, those that leave first, whose copies below are kept like any other: what leaves
above is dropped, and then its copy is all there is."""

COLD = 0.5
"""Share of the experts below, the coldest, among which copies go before others. Were it all of them, each
copy would go with the next read, and what was there before would stay for ever: best while a topic lasts,
worse than to keep all copies once it changes (docs/log.md)."""


class Beside:
    """Makes the policies of one tier's layers, by name, with the tier above in mind.

    An expert that the tier above holds is read there: its copy below takes the place of another, which would
    have to come from disk. So of those that have not been read for a while, copies of what is safe above go
    first; then all others as the policy says.
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
            self._make = policy_for(self._policy)  # policies of a family share a memory
        return _Beside(self._make(), lambda: self._safe(layer))

    def _safe(self, layer: int) -> set[int]:
        """The layer's experts that the tier above will not lose soon."""
        if self.above is None:
            return set()
        order = self.above.coldest(layer)
        return {*order[int(LEAVING * len(order)) :]}


class _Beside:
    """A policy whose order begins with what is cold and safe elsewhere."""

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
