"""Decides for each layer and step what happens to its misses, and learns from the times that it observes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moe_local.cache.keys import ExpertKey
from moe_local.offload.schedule.costs import Costs, Estimate, Work
from moe_local.offload.schedule.split import Machine, Missing, Split, judged, split
from moe_local.offload.schedule.timeline import Span, Timeline
from moe_local.offload.schedule.worth import AdmissionWorth

PROBE = 16
"""One in this many promotions that do not seem worthwhile is made anyway, to notice when they become so."""
EXPLORE_SHARE = 0.005
"""Share of the time that may be lost to splits other than the best, to measure what the best leaves out."""
EXPLORE_FADE = 1 - 1 / 256
"""Factor by which each split discounts the times of earlier splits when that share is computed."""
INPUT_SHARE = 1 / 16
"""The tokens' hidden states go to the host if that costs at most this share of one expert's copy."""


class Needed(NamedTuple):
    """A missing expert whose bytes are in RAM."""

    key: ExpertKey
    work: Work


class MissScheduler:
    """Splits the misses of a layer between the CPU and the link.

    Mode "auto" chooses the split of least cost, mode "cpu" gives the CPU every miss that it can compute.

    A fetched expert has a slot afterwards, one that the CPU computed has none. The slot saves one miss, if
    the expert is needed again before the slot's previous occupant: without the slot, the expert would be a
    miss at its next need, and could be fetched then. So a slot is worth AdmissionWorth's hits, at most one,
    times the average cost of a miss. An expert that the CPU computes can also be *promoted*: copied to a slot
    meanwhile. That costs the bandwidth that the CPU loses, and the time that a fetch of the next layer has to
    wait; it is done where the hits that admissions have been gaining save more than that.

    For the engine's thread only. It does not use torch, and the clock is a parameter.
    """

    def __init__(self, mode: str, costs: Costs, clock: Callable[[], float] = time.perf_counter) -> None:
        """`mode`: "auto" or "cpu"."""
        if mode not in ("auto", "cpu"):
            raise ValueError(f"misses are not scheduled in mode {mode!r}")
        self.mode = mode
        self.costs = costs
        self.timeline = Timeline(costs.link_seconds, clock)
        self.worth = AdmissionWorth()
        self._clock = clock
        self._lead = Estimate(1e-4)
        """Seconds from a decision until the CPU begins."""
        self._fetching = 0.0
        """Share of recent splits that issued copies."""
        self._miss_s = 0.0
        """Seconds that a miss has lately cost on average."""
        self._decided = 0.0
        self._cpu_rate = 1 / costs.cpu_seconds(Work(1, 1))
        self._declined = 0
        self._calls: list[tuple[Sequence[Work], Span]] = []
        """The CPU's calls since the last split."""
        self._turn = 0
        self._spent = 0.0
        """Seconds lately lost to splits other than the best."""
        self._time = 0.0
        """Seconds that the best splits would have taken in that time."""

    # Decisions

    def split(self, needed: Sequence[Needed], resident: Sequence[Work]) -> Split:
        """Decide about the misses of a layer, whose resident experts the GPU computes meanwhile."""
        self._learn()
        self._decided = self._clock()
        missing = self._missing(needed)
        cpu_s = sum(m.cpu_s for m in missing)
        self._cpu_rate = sum(n.work.nbytes for n in needed) / cpu_s
        if self.mode == "cpu":
            self._miss_s = cpu_s / len(missing)
            return Split(tuple(missing))
        resident_s = sum(map(self.costs.gpu_seconds, resident))
        machine = self._machine(resident_s, needed[0].work.nbytes)
        best = split(missing, machine)
        self._miss_s += 0.1 * (max(0.0, best.seconds - resident_s) / len(missing) - self._miss_s)
        chosen = self._explore(best, machine)
        self._fetching += 0.1 * (any(m.arrives_s is None for m in chosen.link) - self._fetching)
        return chosen

    def wants_input(self, input_bytes: int, expert: Work) -> bool:
        """Whether to copy the tokens' hidden states to the host before it is known which experts are missing.

        `expert`: bytes and average tokens of an expert. False if that would take longer than it may gain.
        """
        if self.mode == "cpu":
            return True
        return input_bytes <= INPUT_SHARE * expert.nbytes or self.costs.link_seconds(
            input_bytes
        ) + self.costs.cpu_seconds(expert) < self.costs.link_seconds(expert.nbytes)

    def wants_promotion(self, work: Work) -> bool:
        """Whether an expert that the CPU computes should be copied to a slot while the link is idle."""
        price = self._promotion_seconds(work.nbytes) + self.costs.link_seconds(work.nbytes) * self._fetching
        if self.worth.hits * self._miss_s > price:
            return True
        self._declined += 1
        return self._declined % PROBE == 0

    # Observations

    def issued(self, key: ExpertKey, nbytes: int) -> None:
        """A copy was issued."""
        self.timeline.issued(key, nbytes)

    def copied(self, key: ExpertKey, nbytes: int, seconds: float) -> None:
        """A copy that ran for `seconds` has ended."""
        span = self.timeline.ended(key, seconds)
        self.costs.saw_copy(nbytes, seconds, self.timeline.cpu_beside(span), self._cpu_rate)

    def computed(self, work: Sequence[Work], start: float, end: float) -> None:
        """The CPU computed these experts in one call."""
        span = Span(start, end)
        self.timeline.computed(span)
        self._calls.append((work, span))

    def began(self) -> None:
        """The host has done all that comes before the CPU's share of the last split, if it has a share."""
        self._lead.saw(max(1e-6, self._clock() - self._decided))

    def _learn(self) -> None:
        """Update the costs from the CPU's calls; only now is it known when the copies beside them ended."""
        for work, span in self._calls:
            self.costs.saw_cpu(work, span.end - span.start, self.timeline.link_beside(span))
        self._calls.clear()

    def _explore(self, chosen: Split, machine: Machine) -> Split:
        """The best split, or now and then another: a CPU or a link that is never used is never measured."""
        self._spent *= EXPLORE_FADE
        self._time = self._time * EXPLORE_FADE + chosen.seconds
        if chosen.cpu and chosen.link:
            return chosen
        self._turn += 1
        keep = len(chosen.cpu) - 1 if chosen.cpu else 1  # how many the CPU gets: one is moved, or all are
        keep = keep if self._turn % 2 else len(chosen.link)
        every = (*chosen.cpu, *chosen.link)
        other = judged(every[:keep], every[keep:], machine)
        if self._spent + other.cost - chosen.cost > EXPLORE_SHARE * self._time:
            return chosen
        self._spent += other.cost - chosen.cost
        return other

    def _missing(self, needed: Sequence[Needed]) -> list[Missing]:
        arrivals = self.timeline.arrivals()
        costs, found = self.costs, []
        for key, work in needed:
            arrives = arrivals.get(key)
            copy = costs.link_seconds(work.nbytes) if arrives is None else 0.0
            found.append(Missing(key.expert, costs.cpu_seconds(work), copy, costs.gpu_seconds(work), arrives))
        return found

    def _promotion_seconds(self, nbytes: int) -> float:
        """Seconds that a promotion costs if no fetch waits for it: those by which it delays the CPU."""
        slowdown, _ = self.costs.slowdowns(self._cpu_rate)
        return self.costs.link_seconds(nbytes) * (1 - 1 / slowdown)

    def _machine(self, resident_s: float, nbytes: int) -> Machine:
        cpu, link = self.costs.slowdowns(self._cpu_rate)
        return Machine(
            resident_s=resident_s,
            queue_s=self.timeline.queue_seconds(),
            cpu_start_s=self._lead.value + self.costs.cpu_latency_s,
            cpu_slowdown=cpu,
            link_slowdown=link,
            slot_s=min(max(self.worth.hits, 0.0), 1.0) * self._miss_s,
            promotion_s=self._promotion_seconds(nbytes),
        )
