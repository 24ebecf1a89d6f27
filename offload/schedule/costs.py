"""What a missing expert costs on the CPU and on the link: measured at load, corrected by observations."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WEIGHT = 0.15
"""How far an observation moves an estimate; after some ten of them, earlier ones hardly count."""
LARGEST_STEP = 2.0
"""Largest factor between estimate and observation that counts; beyond it, the estimate moves no further."""
FLAT_TOKENS = 4
"""With up to this many tokens, the CPU kernel's time is that of reading the weights."""
GPU_TOKENS = 64
"""With up to this many tokens, a GPU's time is that of reading the weights."""
GPU_EFFICIENCY = 0.85
"""Share of its memory's bandwidth that a GPU's kernels reach."""
FASTEST_CPU = 1e12
"""Bytes/s that no CPU reads experts at: a bound for measurements in which the clock did not advance."""


class Work(NamedTuple):
    """One expert's part of a computation."""

    nbytes: int
    tokens: int
    format: str = ""
    """Format of the bytes, since kernels read some formats more slowly than others."""


class Estimate:
    """A positive number, estimated from repeated observations of which some are outliers.

    It follows the median of the last three observations, so that a single pause of the process changes
    nothing. It changes by factors, so that it cannot become negative.
    """

    __slots__ = ("_last", "value")

    def __init__(self, value: float) -> None:
        self.value = value
        self._last: deque[float] = deque(maxlen=3)

    def saw(self, observed: float) -> None:
        """Update the estimate from one observation, which must be above 0."""
        self._last.append(observed)
        middle = sorted(self._last)[(len(self._last) - 1) // 2]
        ratio = min(max(middle / self.value, 1 / LARGEST_STEP), LARGEST_STEP)
        self.value *= ratio**WEIGHT


class Costs:
    """The times that the split of a layer's misses depends on.

    For the CPU, a call's latency, and seconds per byte by format and power of two of tokens; for the link, a
    copy's latency, and seconds per byte. Both read the same memory: while both are busy, each is slowed down
    by the factor by which their rates together exceed the memory's bandwidth. That bandwidth is estimated for
    each of the two from the time that it took beside the other, starting from the host memory's bandwidth.
    """

    def __init__(
        self,
        *,
        cpu: Mapping[int, float],
        cpu_latency_s: float,
        link: float,
        link_latency_s: float,
        memory: float,
        gpu: float,
    ) -> None:
        """`cpu`: bytes/s of experts by their number of tokens, for one number at least; holds for each format
        until that is measured. `link`, `memory` (the host's) and `gpu` (reading its own memory): bytes/s."""
        self.cpu_latency_s = cpu_latency_s
        self.link_latency_s = link_latency_s
        self._gpu = gpu
        self._cpu = {("", _bucket(tokens)): Estimate(1 / rate) for tokens, rate in sorted(cpu.items())}
        """Seconds per byte, by format and `_bucket` of tokens."""
        self._link = Estimate(1 / link)
        self._memory_of_cpu = Estimate(memory)
        self._memory_of_link = Estimate(memory)

    def set_cpu(self, work: Work, seconds: float) -> None:
        """A call with `work.nbytes` of experts, each with `work.tokens` tokens, was measured on its own."""
        reading = max(seconds - self.cpu_latency_s, seconds / 2, work.nbytes / FASTEST_CPU)
        self._cpu[work.format, _bucket(work.tokens)] = Estimate(reading / work.nbytes)

    def cpu_seconds(self, work: Work) -> float:
        """Seconds of one expert of a call on the CPU, without the call's latency, while the link is idle."""
        return work.nbytes * self._cpu_estimate(work).value

    def link_seconds(self, nbytes: int) -> float:
        """Seconds of one copy while the CPU is idle."""
        return self.link_latency_s + nbytes * self._link.value

    def gpu_seconds(self, work: Work) -> float:
        """Seconds of one expert on the GPU, a small part of any miss: from its memory's bandwidth alone."""
        return work.nbytes / (GPU_EFFICIENCY * self._gpu) * max(1.0, work.tokens / GPU_TOKENS)

    def slowdowns(self, cpu_rate: float) -> tuple[float, float]:
        """Factors for the time of (a CPU that reads `cpu_rate` bytes/s, the link) while both are busy."""
        both = cpu_rate + 1 / self._link.value
        return max(1.0, both / self._memory_of_cpu.value), max(1.0, both / self._memory_of_link.value)

    def saw_cpu(self, work: Sequence[Work], seconds: float, beside_s: float) -> None:
        """The CPU took `seconds` for a call with these experts; for `beside_s` of them the link was busy."""
        reading = sum(map(self.cpu_seconds, work))
        alone, rate = self.cpu_latency_s + reading, sum(part.nbytes for part in work) / reading
        own = self._own(seconds, alone, beside_s, self._memory_of_cpu, rate)
        if own is None:
            return
        for part in {(part.format, _bucket(part.tokens)): part for part in work}.values():
            estimate = self._cpu_estimate(part)
            estimate.saw(estimate.value * own / alone)

    def saw_copy(self, nbytes: int, seconds: float, beside_s: float, cpu_rate: float) -> None:
        """A copy took `seconds`; for `beside_s` of them the CPU computed, alone at `cpu_rate` bytes/s."""
        alone = self.link_seconds(nbytes)
        own = self._own(seconds, alone, beside_s, self._memory_of_link, cpu_rate)
        if own is not None:
            self._link.saw(max(own - self.link_latency_s, own / 2) / nbytes)

    def _own(
        self, seconds: float, alone: float, beside_s: float, memory: Estimate, cpu_rate: float
    ) -> float | None:
        """Seconds that work which was slowed down for `beside_s` would have taken alone; None if unknown.

        `alone`: the seconds expected for it alone. Work that ran mostly beside the other (CPU or link) serves
        to correct the memory's bandwidth, other work to correct its own speed; only work that was faster
        beside the other than expected alone serves for both.
        """
        both, beside_s = cpu_rate + 1 / self._link.value, min(beside_s, seconds)
        expected = max(1.0, both / memory.value)
        if beside_s <= seconds / 2:
            return seconds - beside_s * (1 - 1 / expected)
        slowdown = 1 / (1 - min(max(seconds - alone, 0.0) / beside_s, 0.9))
        if max(slowdown, expected) > 1.01:  # else the memory suffices for both; its bandwidth is not seen
            memory.saw(both / slowdown)
        return seconds if seconds < alone else None

    def _cpu_estimate(self, work: Work) -> Estimate:
        """Seconds per byte for this format and number of tokens. If it was never measured, it is derived from
        that of the nearest number of tokens, of the same format if possible."""
        key = work.format, _bucket(work.tokens)
        if key not in self._cpu:
            near = min(
                self._cpu, key=lambda known: (known[0] != work.format, known[0] != "", *_far(known, key))
            )
            scale = max(1 << key[1], FLAT_TOKENS) / max(1 << near[1], FLAT_TOKENS)
            self._cpu[key] = Estimate(self._cpu[near].value * scale)
        return self._cpu[key]


def _far(known: tuple[str, int], wanted: tuple[str, int]) -> tuple[int, int]:
    return abs(known[1] - wanted[1]), known[1]


def _bucket(tokens: int) -> int:
    """1 -> 0, 2 and 3 -> 1, 4 to 7 -> 2, and so on."""
    return tokens.bit_length() - 1
