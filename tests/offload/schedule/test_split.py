"""The split of a layer's misses against all there are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.offload.schedule.split import Machine, Missing, Split, both, judged, seconds, split

times = st.floats(0.05, 5)
machines = st.builds(
    Machine,
    resident_s=st.floats(0, 3),
    queue_s=st.sampled_from([0.0, 0.0, 1.5]),
    cpu_start_s=st.floats(0, 0.2),
    cpu_slowdown=st.sampled_from([1.0, 1.3, 2.0]),
    link_slowdown=st.sampled_from([1.0, 1.3, 2.0]),
    slot_s=st.sampled_from([0.0, 0.0, 0.7]),
    promotion_s=st.sampled_from([0.0, 0.3]),
)


def every(missing: list[Missing], machine: Machine) -> list[Split]:
    """All splits."""
    return [
        judged(
            [m for m, on_cpu in zip(missing, chosen, strict=True) if on_cpu],
            [m for m, on_cpu in zip(missing, chosen, strict=True) if not on_cpu],
            machine,
        )
        for chosen in itertools.product((False, True), repeat=len(missing))
    ]


@settings(max_examples=150, deadline=None, database=None)
@given(
    count=st.integers(1, 7),
    issued=st.lists(st.floats(0, 8), max_size=3),
    cost=st.tuples(times, times, st.floats(0.01, 0.5)),
    machine=machines,
)
def test_of_equal_experts_it_is_the_best(
    count: int, issued: list[float], cost: tuple[float, float, float], machine: Machine
) -> None:
    cpu_s, link_s, gpu_s = cost
    missing = [Missing(e, cpu_s, link_s, gpu_s) for e in range(count)]
    missing += [Missing(count + i, cpu_s, 0.0, gpu_s, at) for i, at in enumerate(issued)]
    found = split(missing, machine)
    assert found.cost == pytest.approx(min(one.cost for one in every(missing, machine)))
    assert sorted(m.expert for m in (*found.cpu, *found.link)) == list(range(len(missing)))
    assert found.seconds == pytest.approx(seconds(found.cpu, found.link, machine))


@settings(max_examples=150, deadline=None, database=None)
@given(
    costs=st.lists(st.tuples(times, times, st.floats(0.01, 0.3)), min_size=2, max_size=8), machine=machines
)
def test_of_unequal_experts_it_is_near_the_best(
    costs: list[tuple[float, float, float]], machine: Machine
) -> None:
    machine = machine._replace(slot_s=0.0)
    missing = [Missing(e, *cost) for e, cost in enumerate(costs)]
    best = min(one.cost for one in every(missing, machine))
    found = split(missing, machine)
    slowest = max(machine.cpu_slowdown, machine.link_slowdown)
    border = max(m.cpu_s * m.link_s / (m.cpu_s + m.link_s) for m in missing)
    assert best <= found.cost + 1e-9
    assert found.cost <= best + slowest * border + max(m.gpu_s for m in missing)
    assert found.seconds == pytest.approx(seconds(found.cpu, found.link, machine))


@pytest.mark.parametrize(
    ("cpu_s", "link_s", "on_cpu"),
    [(1.0, 100.0, 6), (100.0, 1.0, 0), (1.0, 1.0, 3), (1.0, 2.0, 4), (2.0, 1.0, 2)],
)
def test_both_end_together(cpu_s: float, link_s: float, on_cpu: int) -> None:
    missing = [Missing(expert, cpu_s, link_s, 0.01) for expert in range(6)]
    assert len(split(missing, Machine()).cpu) == on_cpu


def test_shared_memory_makes_a_second_reader_worth_nothing() -> None:
    """A CPU that reads all that memory gives: the link only takes from it, and what starts later is lost."""
    missing = [Missing(expert, 1.0, 1.0, 0.0) for expert in range(4)]
    saturated = Machine(cpu_slowdown=2.0, link_slowdown=2.0)
    assert split(missing, saturated).seconds == pytest.approx(4.0)
    assert split(missing, Machine()).seconds == pytest.approx(2.0)


def test_both_slow_each_other_down_while_both_work() -> None:
    machine = Machine(cpu_slowdown=2.0, link_slowdown=1.5)
    assert both(3.0, 0.0, machine) == (3.0, 0.0)
    assert both(0.0, 3.0, machine) == (0.0, 3.0)
    cpu, link = both(3.0, 2.0, machine)  # the link is busy for 3 s, in which the CPU does half of its work
    assert (cpu, link) == pytest.approx((4.5, 3.0))
    cpu, link = both(1.0, 6.0, machine)  # the CPU for 2 s, in which the link does 2 / 1.5 of 6 s
    assert (cpu, link) == pytest.approx((2.0, 2.0 + 6.0 - 2 / 1.5))


def test_what_the_gpu_does_anyway_hides_a_fetch() -> None:
    one = [Missing(0, 1.0, 2.0, 0.1)]
    assert split(one, Machine()).cpu
    assert split(one, Machine(slot_s=0.2, promotion_s=0.2)).cpu
    assert split(one, Machine(resident_s=2.5, slot_s=0.2, promotion_s=0.2)).link


def test_a_queue_on_the_link_turns_misses_to_the_cpu() -> None:
    one = [Missing(0, 2.0, 1.0, 0.1)]
    assert split(one, Machine()).link
    assert split(one, Machine(queue_s=3.0)).cpu


def test_of_copies_under_way_the_late_ones_are_not_waited_for() -> None:
    missing = [Missing(0, 1.0, 0.0, 0.1, 0.5), Missing(1, 1.0, 0.0, 0.1, 9.0)]
    found = split(missing, Machine(queue_s=9.0))
    assert [m.expert for m in found.link] == [0]
    assert [m.expert for m in found.cpu] == [1]


def test_many_tokens_go_over_the_link_and_few_to_the_cpu() -> None:
    """In a prompt the CPU takes longer for an expert with more tokens, and a copy does not."""
    missing = [
        Missing(expert, 0.5 * tokens, 2.0, 0.01 * tokens) for expert, tokens in enumerate((9, 1, 8, 2))
    ]
    found = split(missing, Machine())
    assert sorted(m.expert for m in found.cpu) == [1, 3]
    assert [m.expert for m in found.link] == [0, 2]  # the GPU takes longest for the first


def test_a_slot_is_worth_a_wait() -> None:
    one = [Missing(0, 1.0, 1.5, 0.0)]
    assert split(one, Machine()).cpu
    assert split(one, Machine(slot_s=1.0, promotion_s=1.0)).link
    assert split(one, Machine(slot_s=1.0, promotion_s=0.1)).cpu  # it gets its slot all the same


def test_nothing_missing() -> None:
    assert split([], Machine(resident_s=1.0)) == Split((), (), 1.0, 1.0)
