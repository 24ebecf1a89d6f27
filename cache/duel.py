"""Recency or frequency: which of two eviction orders the layers of a cache had better follow now."""

from __future__ import annotations

FADE_STEPS = 8
"""Half-life of the shadows' hits, in steps of each layer."""
LOSES = 1.3
"""Frequency is abandoned when its shadow has lately hit this many experts per layer less than recency's."""
WINS = 1.0
"""It is resumed when its shadow has hit this many more; a lead above this is not remembered."""
MEMORY_STEPS = 512
"""Half-life of the comparison of the cache's own hits with those of LRU's shadow, in steps of each layer."""
ALLOWED_SHARE = 0.003
"""Misses beyond LRU's that are tolerated, as a share of all experts needed lately."""
ALLOWED_AT_ONCE = 56
"""Steps whose needs are added to those seen, since otherwise the first steps would tolerate nothing."""
CREDIT = 0.5
"""Past gains count for at most this part of what is tolerated: they are no reason to lose now."""


class Duel:
    """Follows frequency until it loses, and then recency until frequency would win again.

    All layers of a cache share one, since a new topic is new in all of them: together they see it within a
    few steps, where one layer's hits are mostly chance. The shadows of both orders are told what each step
    needed and are judged by that, whichever order the cache follows. Beside it what the cache hit is weighed
    against LRU's shadow. When it has fallen behind by more than `ALLOWED_SHARE` of what was needed, it is in
    debt: then frequency is followed only while it leads, and taken up only for a lead above the debt. So the
    more often it fails, the more evidence it needs. What remains is what it takes to see the first failure
    and to bring back what LRU would have kept: less than a miss for every two slots where a topic that just
    fits is followed by another one, once.
    """

    __slots__ = ("_balance", "_fade", "_layers", "_lead", "_memory", "_needed", "_steps", "recency")

    def __init__(self) -> None:
        self.recency = False
        """Whether recency is followed now."""
        self._layers = 0
        self._lead = 0.0
        """Faded hits of frequency's shadow less those of recency's, all layers."""
        self._balance = 0.0
        """Faded hits of the cache itself less those of recency's shadow."""
        self._needed = 0.0
        self._steps = 0.0
        self._fade = self._memory = 1.0

    def join(self) -> None:
        """One more layer takes part."""
        self._layers += 1
        self._fade = 0.5 ** (1 / (FADE_STEPS * self._layers))
        self._memory = 0.5 ** (1 / (MEMORY_STEPS * self._layers))

    def judge(self, needed: int, own: int, recency: int, frequency: int) -> None:
        """One layer's step needed so many experts; the cache and both shadows had so many of them."""
        layers = self._layers
        self._needed = needed + self._memory * self._needed
        self._steps = 1 + self._memory * self._steps
        self._lead = frequency - recency + self._fade * self._lead
        allowed = ALLOWED_SHARE * self._needed * (1 + ALLOWED_AT_ONCE * layers / self._steps)
        self._balance = min(own - recency + self._memory * self._balance, CREDIT * allowed)
        debt = max(0.0, -self._balance - allowed)
        if self.recency:
            self.recency = self._lead < WINS * layers + debt
        else:
            self._lead = min(self._lead, WINS * layers)
            self.recency = self._lead <= (0.0 if debt else -LOSES * layers)
