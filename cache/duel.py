"""Decides whether the layers of a cache should evict by recency or by frequency at the moment.

It compares the hits of two simulated caches, one for each order: the shadows of AdaptivePolicy.
"""

from __future__ import annotations

FADE_STEPS = 8
"""Half-life of the counts of the shadows' hits, in steps of each layer."""
LOSES = 1.3
"""Frequency is abandoned when its shadow has lately had this many hits per layer fewer than recency's."""
WINS = 1.0
"""Frequency is resumed when its shadow has had this many hits more. While frequency is followed, its lead is
capped at this."""
MEMORY_STEPS = 512
"""Half-life of the comparison of the cache's own hits with those of LRU's shadow, in steps of each layer."""
ALLOWED_SHARE = 0.003
"""Misses in excess of LRU's that are tolerated, as a share of all experts needed lately."""
ALLOWED_AT_ONCE = 56
"""Steps of average need that the tolerance is granted in advance, since it would be near 0 at first."""
CREDIT = 0.5
"""Most that past gains over LRU may count for, as a part of the tolerance: they do not justify losses now."""


class Duel:
    """Follows frequency until it loses, and then recency until frequency would win again.

    All layers of a cache share one Duel, since a change of topic shows in all of them: together they detect
    it within a few steps, while a single layer's hits are mostly chance. The shadows of both orders see the
    experts of each step and are compared by their hits, whichever order the cache follows. In addition the
    hits of the cache itself are compared with those of LRU's shadow. When the cache has fallen behind by more
    than `ALLOWED_SHARE` of the needed experts, it is in debt: then frequency is followed only while its
    shadow leads, and resumed only when that lead exceeds the debt. So the more often frequency fails, the
    more evidence it takes to resume it. The cost that remains is that of detecting the first failure and
    reloading what LRU would have kept: less than one miss for every two slots where a topic whose experts
    just fit is followed, once, by another.
    """

    __slots__ = ("_balance", "_fade", "_layers", "_lead", "_memory", "_needed", "_steps", "recency")

    def __init__(self) -> None:
        self.recency = False
        """Whether recency is followed now."""
        self._layers = 0
        self._lead = 0.0
        """Faded hits of frequency's shadow minus those of recency's, over all layers."""
        self._balance = 0.0
        """Faded hits of the cache itself minus those of recency's shadow, over all layers."""
        self._needed = 0.0
        self._steps = 0.0
        self._fade = self._memory = 1.0

    def join(self) -> None:
        """Register one more layer."""
        self._layers += 1
        self._fade = 0.5 ** (1 / (FADE_STEPS * self._layers))
        self._memory = 0.5 ** (1 / (MEMORY_STEPS * self._layers))

    def judge(self, needed: int, own: int, recency: int, frequency: int) -> None:
        """A step of one layer needed `needed` experts. `own`: the cache's hits; the others: the shadows'."""
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
