"""Splits the missing experts of a layer between the CPU and the link, so that both end at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

BORDER = 4
"""Experts on either side of the border between CPU and link that are tried on the other side."""


class Missing(NamedTuple):
    """An expert that a layer needs, whose bytes are in RAM but not in the fastest tier."""

    expert: int
    cpu_s: float
    """Seconds that the CPU takes for its tokens while the link is idle."""
    link_s: float
    """Seconds that its copy takes while the CPU is idle; 0 if it was issued already."""
    gpu_s: float
    """Seconds that the GPU takes for its tokens once the expert has arrived."""
    arrives_s: float | None = None
    """Seconds from now until the end of its copy, if that was issued already; None if not."""


class Machine(NamedTuple):
    """The state of the machine when a layer's misses are split, in seconds from then on."""

    resident_s: float = 0.0
    """Time of the GPU for resident experts, needed in any case."""
    queue_s: float = 0.0
    """Time of the link for copies that were issued already."""
    cpu_start_s: float = 0.0
    """Time that the CPU's share takes in addition to its experts: until its call begins, and the call's
    latency."""
    cpu_slowdown: float = 1.0
    """How many times as long the CPU takes while the link is busy, since both read the same memory."""
    link_slowdown: float = 1.0
    """How many times as long copies take while the CPU computes."""
    slot_s: float = 0.0
    """Time that later steps save if an expert has a slot afterwards; one that the CPU computes has none."""
    promotion_s: float = 0.0
    """Cost of copying an expert that the CPU computes to a slot all the same, while the link is idle."""


class Split(NamedTuple):
    """A decision. Every missing expert is either in `cpu` or in `link`."""

    cpu: tuple[Missing, ...] = ()
    link: tuple[Missing, ...] = ()
    """In the order in which their copies are to be issued."""
    seconds: float = 0.0
    """Time from now until the layer ends."""
    cost: float = 0.0
    """`seconds`, and the time that later steps lose by this split."""


def split(missing: Sequence[Missing], machine: Machine) -> Split:
    """The split with the least cost, among equally good ones that with the fewest experts on the CPU.

    The experts are sorted by the ratio of their times on the CPU and on the link, and a prefix goes to the
    CPU: every prefix is tried, then swaps and moves across the border. Of the experts whose copies are in
    flight, those that arrive last are given to the CPU first. The split is optimal if experts have the same
    costs, as in decoding. Otherwise, except for the effect of the shared memory, it costs at most
    cpu_s * link_s / (cpu_s + link_s) of one expert more than the optimum: so far the best prefix may be from
    a split in which one expert may be cut in two.
    """
    issued = sorted((m for m in missing if m.arrives_s is not None), key=_arrival)
    rest = sorted((m for m in missing if m.arrives_s is None), key=_cpu_per_link)
    best, kept, on_cpu, lasts = (float("inf"), 0), 0, 0, 0.0
    for early in range(len(issued) + 1):
        late = len(issued) - early
        for count, ends in enumerate(_prefixes(rest, issued[:early], issued[early:], machine)):
            cost = ends + _later(late + count, count < len(rest), machine)
            if (round(cost, 9), late + count) < best:
                best, kept, on_cpu, lasts = (round(cost, 9), late + count), early, count, ends
    link = sorted(rest[on_cpu:], key=_gpu, reverse=True)
    found = Split((*issued[kept:], *rest[:on_cpu]), (*issued[:kept], *link), lasts, best[0])
    return _refine(found, machine) if len({(m.cpu_s, m.link_s) for m in rest}) > 1 else found


def seconds(cpu: Sequence[Missing], link: Sequence[Missing], machine: Machine) -> float:
    """Seconds until a layer ends whose missing experts are split like this.

    The CPU and the link, each with a fixed amount of work, slow each other down while both are busy. The GPU
    computes an expert when it has arrived; the one with the most tokens is copied first.
    """
    new = [m for m in link if m.arrives_s is None]
    last_arrival = max((m.arrives_s + m.gpu_s for m in link if m.arrives_s is not None), default=0.0)
    return _ends(
        _Sums(
            cpu_s=sum(m.cpu_s for m in cpu),
            copies_s=sum(m.link_s for m in new),
            gpu_s=sum(m.gpu_s for m in link),
            last_gpu_s=min((m.gpu_s for m in new), default=0.0),
            first_copy_s=max(new, key=_gpu).link_s if new else 0.0,
            last_arrival_s=last_arrival,
        ),
        machine,
        bool(new),
    )


def _later(on_cpu: int, copies: bool, machine: Machine) -> float:
    """Seconds that later steps lose because `on_cpu` experts are computed by the CPU and get no slot.

    One of them can be promoted if the link is idle, so without `copies` of this layer.
    """
    if not on_cpu:
        return 0.0
    promoted = not copies and not machine.queue_s and machine.promotion_s < machine.slot_s
    return on_cpu * machine.slot_s - (machine.slot_s - machine.promotion_s if promoted else 0.0)


def judged(cpu: Sequence[Missing], link: Sequence[Missing], machine: Machine) -> Split:
    """The split with these experts on the CPU and on the link, and what it costs."""
    ends = seconds(cpu, link, machine)
    copies = any(m.arrives_s is None for m in link)
    return Split(tuple(cpu), tuple(link), ends, ends + _later(len(cpu), copies, machine))


class _Sums(NamedTuple):
    cpu_s: float
    copies_s: float
    gpu_s: float
    last_gpu_s: float
    first_copy_s: float
    last_arrival_s: float


def _ends(sums: _Sums, machine: Machine, copies: bool) -> float:
    cpu = sums.cpu_s + machine.cpu_start_s if sums.cpu_s else 0.0
    busy = machine.queue_s + sums.copies_s
    cpu_wall, _ = both(cpu, busy, machine)

    def wall(work: float) -> float:
        """Seconds until the link has done `work`, given in seconds while the CPU is idle."""
        slow = work * machine.link_slowdown
        return slow if slow <= cpu_wall else work + cpu_wall * (1 - 1 / machine.link_slowdown)

    gpu = machine.resident_s + sums.gpu_s
    if sums.last_arrival_s:
        gpu = max(gpu, wall(sums.last_arrival_s))
    if copies:
        first = wall(machine.queue_s + sums.first_copy_s)
        gpu = max(gpu, wall(busy) + sums.last_gpu_s, first + sums.gpu_s)
    return max(cpu_wall, gpu)


def both(cpu_s: float, link_s: float, machine: Machine) -> tuple[float, float]:
    """Seconds until the CPU and the link end, if their work would take these seconds for each alone."""
    cpu, link = cpu_s * machine.cpu_slowdown, link_s * machine.link_slowdown
    if cpu <= link:
        return cpu, link_s + cpu * (1 - 1 / machine.link_slowdown)
    return cpu_s + link * (1 - 1 / machine.cpu_slowdown), link


def _prefixes(
    rest: Sequence[Missing], kept: Sequence[Missing], late: Sequence[Missing], machine: Machine
) -> Iterator[float]:
    """Seconds until the layer ends with `late` and 0, 1 ... of `rest` on the CPU, all others on the link."""
    cpu = list(accumulate((m.cpu_s for m in rest), initial=sum(m.cpu_s for m in late)))
    backwards = rest[::-1]
    copies = list(accumulate((m.link_s for m in backwards), initial=0.0))[::-1]
    gpu = list(accumulate((m.gpu_s for m in backwards), initial=sum(m.gpu_s for m in kept)))[::-1]
    last = [*list(accumulate((m.gpu_s for m in backwards), min))[::-1], 0.0]
    first = [*list(accumulate(backwards, _longer_on_gpu))[::-1], None]
    arrival = max((_arrival(m) + m.gpu_s for m in kept), default=0.0)
    for count in range(len(rest) + 1):
        leader = first[count]
        sums = _Sums(
            cpu[count], copies[count], gpu[count], last[count], leader.link_s if leader else 0.0, arrival
        )
        yield _ends(sums, machine, leader is not None)


def _refine(best: Split, machine: Machine) -> Split:
    """Improve a split, where possible, by moving or swapping experts near its border."""
    for _ in range(3):
        found = min(_neighbours(best, machine), key=_preference, default=best)
        if found.cost >= best.cost:
            break
        best = found
    return best


def _neighbours(near: Split, machine: Machine) -> Iterator[Split]:
    """Splits with one of the experts nearest to the border moved, or two of them swapped."""
    on_cpu = sorted((m for m in near.cpu if m.arrives_s is None), key=_cpu_per_link)[-BORDER:]
    on_link = sorted((m for m in near.link if m.arrives_s is None), key=_cpu_per_link)[:BORDER]
    for away in (None, *on_cpu):
        for here in (None, *on_link):
            if away is None and here is None:
                continue
            cpu = (*_without(near.cpu, away), *((here,) if here else ()))
            link = (*_without(near.link, here), *((away,) if away else ()))
            link = tuple(sorted(link, key=lambda m: (m.arrives_s is None, -m.gpu_s)))
            yield judged(cpu, link, machine)


def _without(some: Iterable[Missing], one: Missing | None) -> tuple[Missing, ...]:
    return tuple(m for m in some if m is not one)


def _preference(candidate: Split) -> tuple[float, int]:
    return round(candidate.cost, 9), len(candidate.cpu)


def _arrival(m: Missing) -> float:
    assert m.arrives_s is not None
    return m.arrives_s


def _longer_on_gpu(a: Missing, b: Missing) -> Missing:
    return b if b.gpu_s >= a.gpu_s else a


def _cpu_per_link(m: Missing) -> float:
    return m.cpu_s / m.link_s


def _gpu(m: Missing) -> float:
    return m.gpu_s
