"""Belady's optimum, which no other eviction order can beat, since it knows what will be needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

NEVER = 1 << 62


class BeladyPolicy:
    """Eviction order by next use, farthest first: MIN (Belady, IBM Systems J. 5(2), 1966) for whole steps.

    It is the optimum for caches that must admit the experts of a step before the step runs, as `ExpertCache`
    does. A cache that may use an expert without keeping it can do better (`hits_with_bypass`). It works only
    on recordings: `steps` are the experts that one layer needed, and each `touch` must be the next of them.
    """

    __slots__ = ("_known", "_next_use", "_now", "_steps")

    def __init__(self, steps: Sequence[Sequence[int]]) -> None:
        self._steps = steps
        self._next_use = _next_uses(steps)
        self._now = -1
        self._known: dict[int, int] = {}
        """Step of the next use of each known expert."""

    def touch(self, experts: Sequence[int], absent: Sequence[int] = ()) -> None:
        """Raises ValueError if these are not the experts of the next recorded step."""
        now = self._now = self._now + 1
        if now == len(self._steps) or set(experts) != set(self._steps[now]):
            raise ValueError(f"step {now} needs {list(experts)}, which was not foreseen")
        uses = self._next_use[now]
        for expert in self._known.keys() & uses.keys():
            self._known[expert] = uses[expert]

    def pass_over(self, experts: Sequence[int]) -> None:
        """Raises ValueError: the optimum is defined only for experts that are admitted."""
        raise ValueError(f"experts {list(experts)} were passed over; replay what is admitted")

    def insert(self, expert: int) -> None:
        self._known[expert] = self._next_use[self._now][expert]

    def remove(self, expert: int) -> None:
        del self._known[expert]

    def coldest(self) -> Iterator[int]:
        return iter(sorted(self._known, key=self._known.__getitem__, reverse=True))

    def __len__(self) -> int:
        return len(self._known)


def hits_with_bypass(steps: Sequence[Sequence[int]], slots: int) -> list[int]:
    """Hits of each step if a needed expert may be used without being kept: the optimum over all caches."""
    kept: dict[int, int] = {}
    hits = []
    for step, uses in zip(steps, _next_uses(steps), strict=True):
        hits.append(sum(expert in kept for expert in step))
        kept.update(uses)
        kept = dict(sorted(kept.items(), key=lambda item: item[1])[:slots])
    return hits


def _next_uses(steps: Sequence[Sequence[int]]) -> list[dict[int, int]]:
    """For each step and each of its experts, the next step that needs that expert, or NEVER."""
    seen: dict[int, int] = {}
    uses = []
    for number in range(len(steps) - 1, -1, -1):
        uses.append({expert: seen.get(expert, NEVER) for expert in steps[number]})
        seen.update(dict.fromkeys(steps[number], number))
    return uses[::-1]
