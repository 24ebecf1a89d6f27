"""An eviction policy of one's own, beside one that comes with the package.

A policy is bookkeeping over expert numbers of one layer: the cache tells it what happens and asks who should
leave. It never changes an answer, only how often an expert has to be brought.
"""

from collections.abc import Iterator, Sequence

import moe_local


class SecondChance:
    """CLOCK: first in, first out, but who was needed since it came is passed over once."""

    def __init__(self) -> None:
        self._needed: dict[int, bool] = {}  # in the order of the clock's hand

    def touch(self, experts: Sequence[int], absent: Sequence[int] = ()) -> None:
        for expert in experts:
            if expert in self._needed:
                self._needed[expert] = True

    def pass_over(self, experts: Sequence[int]) -> None:
        self.touch(experts)

    def insert(self, expert: int) -> None:
        self._needed[expert] = False

    def remove(self, expert: int) -> None:
        # The hand went past all that stand before it and had been needed: their chance is used up.
        for other in list(self._needed):
            if other == expert:
                break
            if self._needed[other]:
                del self._needed[other]
                self._needed[other] = False
        del self._needed[expert]

    def coldest(self) -> Iterator[int]:
        yield from [expert for expert, needed in self._needed.items() if not needed]
        yield from [expert for expert, needed in self._needed.items() if needed]

    def __len__(self) -> int:
        return len(self._needed)


def main() -> None:
    moe_local.register_policy("second-chance", SecondChance)
    for policy in ("second-chance", "lru"):
        with moe_local.load("demo", slots=4, policy=policy, prefetch="off") as model:
            out = model.generate("Why does prefetch help?", max_new_tokens=64)
        stats = out.stats
        print(f"{policy}: {100 * stats.hits / (stats.hits + stats.misses):.1f} % hits")
        print(out.text)


if __name__ == "__main__":
    main()
