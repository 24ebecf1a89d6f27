"""What the scheduler knows of its machine: estimates, when what ran, and what a slot is worth."""

from __future__ import annotations

import random

import pytest

from moe_local.offload.schedule.costs import Costs, Estimate, Work
from moe_local.offload.schedule.timeline import Span, Timeline
from moe_local.offload.schedule.worth import FIRST_GUESS, HORIZON, MOST_WATCHED, AdmissionWorth

MIB = 1 << 20


def make_costs(cpu: float = 40e9, link: float = 20e9, memory: float = 50e9) -> Costs:
    return Costs(cpu={1: cpu}, cpu_latency_s=20e-6, link=link, link_latency_s=10e-6, memory=memory, gpu=8e11)


# Estimates


def test_an_estimate_follows_and_a_single_pause_does_not_move_it() -> None:
    estimate = Estimate(1.0)
    for _ in range(40):
        estimate.saw(2.0)
    assert estimate.value == pytest.approx(2.0, rel=0.01)
    estimate.saw(500.0)
    assert estimate.value == pytest.approx(2.0, rel=0.01)
    for _ in range(60):
        estimate.saw(0.5)
    assert estimate.value == pytest.approx(0.5, rel=0.01)


def test_first_figures() -> None:
    costs = make_costs()
    assert costs.cpu_seconds(Work(40 * MIB, 1)) == pytest.approx(40 * MIB / 40e9)
    assert costs.link_seconds(20 * MIB) == pytest.approx(10e-6 + 20 * MIB / 20e9)
    assert costs.slowdowns(40e9) == pytest.approx((1.2, 1.2))
    assert costs.slowdowns(20e9) == (1.0, 1.0)
    assert costs.gpu_seconds(Work(MIB, 256)) == pytest.approx(4 * costs.gpu_seconds(Work(MIB, 64)))


def test_more_tokens_take_longer_once_the_weights_are_no_longer_the_most() -> None:
    costs = make_costs()
    one, four, sixteen, hundred = (costs.cpu_seconds(Work(MIB, tokens)) for tokens in (1, 4, 16, 100))
    assert one == four
    assert sixteen == pytest.approx(4 * four)
    assert hundred == pytest.approx(4 * sixteen)
    costs.set_cpu(Work(100 * MIB, 16), 200 * one)
    assert costs.cpu_seconds(Work(MIB, 16)) == pytest.approx(2 * one, rel=0.01)
    assert costs.cpu_seconds(Work(MIB, 1)) == one
    costs.set_cpu(Work(100 * MIB, 16), 0.0)  # by a clock that stood still
    assert 0 < costs.cpu_seconds(Work(MIB, 16)) < one / 10


@pytest.mark.parametrize("wrong", [0.6, 1.7])
def test_what_runs_alone_corrects_its_own_speed(wrong: float) -> None:
    costs, rng = make_costs(cpu=40e9 * wrong, link=20e9 * wrong), random.Random(0)
    for _ in range(60):
        noise = rng.gauss(1, 0.03)
        costs.saw_cpu([Work(MIB, 1)] * 8, noise * (20e-6 + 8 * MIB / 40e9), 0.0)
        costs.saw_copy(8 * MIB, noise * (10e-6 + 8 * MIB / 20e9), 0.0, 40e9)
    assert costs.cpu_seconds(Work(MIB, 1)) == pytest.approx(MIB / 40e9, rel=0.05)
    assert costs.link_seconds(8 * MIB) == pytest.approx(10e-6 + 8 * MIB / 20e9, rel=0.05)


@pytest.mark.parametrize("memory", [30e9, 45e9, 200e9])
def test_what_runs_beside_the_other_tells_of_the_memory(memory: float) -> None:
    costs, slowdown = make_costs(memory=50e9), max(1.0, 60e9 / memory)
    for _ in range(60):
        took = slowdown * (20e-6 + 8 * MIB / 40e9)
        costs.saw_cpu([Work(MIB, 1)] * 8, took, beside_s=took)
        took = slowdown * (10e-6 + 8 * MIB / 20e9)
        costs.saw_copy(8 * MIB, took, beside_s=took, cpu_rate=40e9)
    assert costs.slowdowns(40e9) == pytest.approx((slowdown, slowdown), rel=0.06)
    assert costs.cpu_seconds(Work(MIB, 1)) == pytest.approx(MIB / 40e9, rel=0.05)
    assert costs.link_seconds(8 * MIB) == pytest.approx(10e-6 + 8 * MIB / 20e9, rel=0.05)


# When what ran


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_timeline() -> tuple[Timeline, Clock]:
    """Copies take a second for each byte."""
    clock = Clock()
    return Timeline(float, clock), clock


def test_copies_run_one_after_the_other() -> None:
    timeline, clock = make_timeline()
    timeline.issued("a", 2)
    timeline.issued("b", 3)
    assert timeline.queue_seconds() == 5
    assert timeline.arrivals() == {"a": 2, "b": 5}
    clock.now = 101
    assert timeline.arrivals() == {"a": 1, "b": 4}
    clock.now = 104
    assert timeline.ended("a", 2.5) == Span(100, 102.5)
    assert timeline.queue_seconds() == 1.5
    clock.now = 110
    assert timeline.queue_seconds() == 0
    assert timeline.arrivals() == {"b": 0}
    assert timeline.ended("b", 4) == Span(102.5, 106.5)
    assert timeline.arrivals() == {}


def test_a_copy_cannot_have_ended_later_than_now() -> None:
    timeline, clock = make_timeline()
    timeline.issued("a", 2)
    clock.now = 101
    assert timeline.ended("a", 3).end == 101


def test_who_was_busy_beside_whom() -> None:
    timeline, clock = make_timeline()
    timeline.issued("a", 2)
    timeline.computed(Span(101, 105))
    clock.now = 106
    copy = timeline.ended("a", 2)
    assert timeline.cpu_beside(copy) == 1
    assert timeline.link_beside(Span(101, 105)) == 1
    timeline.issued("b", 4)
    assert timeline.link_beside(Span(101, 105)) == 1
    assert timeline.link_beside(Span(107, 109)) == 2


# What a slot is worth


def test_an_expert_that_comes_again_and_one_that_does_not() -> None:
    again, never = AdmissionWorth(), AdmissionWorth()
    for step in range(600):
        for worth, needed in ((again, [1]), (never, [2])):
            worth.needed(0, needed)
            if step % HORIZON == 0:
                worth.admitted(0, 1, victim=2)
    assert again.hits > 10
    assert never.hits < -10


def test_where_routing_has_no_memory_a_slot_is_worth_nothing() -> None:
    worth, rng = AdmissionWorth(), random.Random(0)
    for _ in range(4000):
        chosen = rng.sample(range(16), 4)
        worth.needed(3, chosen)
        worth.admitted(3, chosen[0], rng.choice([e for e in range(16) if e not in chosen]))
    assert abs(worth.hits) < 0.3


def test_only_so_many_are_watched_and_nothing_is_known_at_first() -> None:
    worth = AdmissionWorth()
    for expert in range(100):
        worth.admitted(0, expert, 200)
    assert worth.hits == FIRST_GUESS
    for _ in range(HORIZON - 1):
        worth.needed(0, [0])
    assert worth.hits == FIRST_GUESS
    worth.needed(0, [0])
    mean = (10 * FIRST_GUESS + HORIZON) / (10 + MOST_WATCHED)
    assert worth.hits == pytest.approx(mean, rel=0.25)
