"""Experts that the CPU computes beside a device: order, pins, promotions, faults."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from moe_local.cache.errors import TransferError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.schedule.costs import Work
from moe_local.offload.schedule.split import Split

Make = Callable[..., Any]


@pytest.fixture
def given(any_scheduler: Make) -> Make:
    """given(on_cpu, promote=False) -> a scheduler that gives just these missing experts to the CPU."""

    def make(on_cpu: Sequence[int], *, promote: bool = False) -> Any:
        scheduler = any_scheduler()
        decide = type(scheduler).__mro__[1].split

        def split(needed: Any, resident: Any) -> Split:
            chosen = decide(scheduler, needed, resident)
            every = sorted((*chosen.cpu, *chosen.link), key=lambda m: m.expert)
            cpu = tuple(m for m in every if m.expert in on_cpu)
            return Split(cpu, tuple(m for m in every if m not in cpu), chosen.seconds)

        scheduler.split = split
        scheduler.wants_promotion = lambda work: promote
        return scheduler

    return make


def test_the_device_gets_all_it_can_have_before_the_host_computes(
    make_rig: Make, make_device: Make, given: Make
) -> None:
    """Copies are issued first, then residents handed out, then what is copied, then the host's share."""
    rig = make_rig("ram", slots=5, device=make_device(luck=0.0, lazy=True), scheduler=given([3, 4]))
    rig.step(0, [0, 1])
    rig.settle()
    before = rig.device.copies
    groups = []
    for group in rig.serve(0, [3, 0, 2, 4, 1]):
        assert rig.device.copies == before + 1
        groups.append([(lease.expert, lease.on_host) for lease in group])
        for lease in group:
            rig.check_lease(0, lease)
    assert groups == [[(0, False), (1, False)], [(2, False)], [(3, True), (4, True)]]
    rig.device.synchronize()
    rig.check()
    stats = rig.store.snapshot()
    assert (stats.hits, stats.misses) == (2, 5)
    assert set(rig.tier.cache.residents(0)) == {0, 1, 2}


def test_without_tokens_everything_goes_to_the_device(make_rig: Make, given: Make) -> None:
    rig = make_rig("ram", slots=4, scheduler=given(range(8)))
    for group in rig.store.serve(0, [1, 2, 3]):
        assert not any(lease.on_host for lease in group)
    assert rig.tier.cache.is_resident(0, 1)


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_what_is_on_disk_takes_the_way_to_the_device(make_rig: Make, any_scheduler: Make, mode: str) -> None:
    rig = make_rig("ram+disk", slots=3, ram_slots=4, scheduler=any_scheduler(mode=mode))
    rig.step(0, [1, 2])
    assert rig.on_host == 0
    assert {1, 2} <= set(rig.tier.cache.residents(0))


def test_the_cpu_gets_every_miss_that_is_in_ram(make_rig: Make, any_scheduler: Make) -> None:
    scheduler = any_scheduler(mode="cpu")
    scheduler.wants_promotion = lambda work: False
    rig = make_rig("ram", slots=2, scheduler=scheduler)
    rig.tier.cache.has_room = lambda layer, expert: False
    for _ in range(5):
        assert rig.step(1, [4, 5, 6]) == [[4, 5, 6]]
    stats = rig.store.snapshot()
    assert (stats.hits, stats.misses, stats.bytes.h2d) == (0, 15, 0)


def test_promoted_when_the_link_is_idle(make_rig: Make, make_device: Make, given: Make) -> None:
    rig = make_rig("ram", slots=2, device=make_device(luck=0.0), scheduler=given(range(8), promote=True))
    rig.tokens = lambda expert: 2 if expert == 5 else 1
    rig.step(0, [4, 5, 6])
    assert rig.tier.cache.loading(0) == (5,)  # the one with the most tokens, into an empty slot
    rig.step(0, [4, 6])  # the link is busy
    assert rig.tier.cache.loading(0) == (5,)
    rig.settle()
    rig.step(0, [5, 6])
    stats = rig.store.snapshot()
    assert (stats.hits, stats.misses, stats.prefetch.issued) == (1, 6, 0)
    rig.settle()
    assert set(rig.tier.cache.residents(0)) == {5, 6}


def test_a_promotion_takes_no_slot_of_the_step(make_rig: Make, given: Make) -> None:
    rig = make_rig("ram", slots=2, scheduler=given([3], promote=True))
    rig.step(0, [0, 1])
    rig.settle()
    rig.step(0, [0, 3, 1])
    assert set(rig.tier.cache.residents(0)) == {0, 1}
    rig.step(0, [0, 3])
    rig.settle()
    assert set(rig.tier.cache.residents(0)) == {0, 3}


def test_a_late_prefetch_may_be_computed_by_the_host_and_arrives_all_the_same(
    make_rig: Make, make_device: Make, given: Make
) -> None:
    rig = make_rig("ram", slots=3, device=make_device(luck=0.0), scheduler=given([4]))
    rig.store.prefetch(0, [4], distance=1, budget_bytes=1 << 20)
    assert rig.step(0, [4]) == [[4]]
    assert rig.on_host == 1
    rig.settle()
    assert rig.step(0, [4]) == [[4]]
    stats = rig.store.snapshot()
    assert (stats.hits, stats.misses) == (1, 1)
    assert (stats.prefetch.issued, stats.prefetch.used, stats.prefetch.late) == (1, 0, 1)
    assert rig.on_host == 1


def test_a_copy_that_fails_while_the_cpu_computes(make_rig: Make, make_device: Make, given: Make) -> None:
    device = make_device()
    rig = make_rig("ram", slots=3, device=device, scheduler=given([3]))
    device.fail_copies = 1
    seen = []
    with pytest.raises(TransferError, match="expert 2 of MoE layer 0 could not be copied"):
        for group in rig.serve(0, [2, 3]):
            seen += [lease.expert for lease in group]
            for lease in group:
                rig.check_lease(0, lease)
    assert seen == [3]
    rig.settle()
    rig.step(0, [2, 3])
    rig.settle()


def test_a_read_that_fails_while_the_cpu_computes(make_rig: Make, read_gate: Any, given: Make) -> None:
    rig = make_rig("ram+disk", slots=3, ram_slots=5, scheduler=given([1, 2]))
    rig.step(0, [1, 2])
    rig.step(0, [3, 4, 5])
    rig.settle()
    read_gate.errors[rig.locations[ExpertKey(0, 7)].offset] = OSError(errno.EIO, "Input/output error")
    read_gate.shut()
    groups = []
    with pytest.raises(TransferError, match="expert 7 of MoE layer 0"):
        for group in rig.serve(0, [1, 7, 2]):
            groups.append([lease.expert for lease in group])
            for lease in group:
                rig.check_lease(0, lease)
            if len(groups) == 2:
                read_gate.open()
    assert groups == [[1], [2]]  # one by one while a read is waited for
    rig.settle()
    read_gate.errors.clear()
    rig.step(0, [1, 7, 2])
    rig.settle()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_computation_leaves_no_pin(
    make_rig: Make, given: Make, error: type[BaseException]
) -> None:
    rig = make_rig("ram", slots=3, scheduler=given(range(8)))

    def compute() -> None:
        for group in rig.serve(0, [1, 2, 3]):
            assert group[0].on_host
            raise error

    with pytest.raises(error):
        compute()
    rig.settle()
    rig.step(0, [1, 2, 3])
    rig.settle()


def test_ctrl_c_before_the_cpu_begins(make_rig: Make, given: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig("ram", slots=3, scheduler=given(range(8)))

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_local.offload.store.store.check_interrupt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(rig.serve(0, [1, 2, 3]))
    monkeypatch.undo()
    rig.settle()
    rig.step(0, [1, 2, 3])


def test_what_ran_reaches_the_costs(make_rig: Make, make_device: Make, given: Make) -> None:
    scheduler = given([1, 2])
    rig = make_rig("ram", slots=4, device=make_device(), scheduler=scheduler)
    costs, work = scheduler.costs, Work(4096, 1, "raw")
    cpu, link = (costs.cpu_seconds(work), costs.slowdowns(1e9)), costs.link_seconds(4096)
    for _ in range(30):
        for start in (0, 4):
            rig.step(0, [start, start + 1, start + 2, start + 3])
            rig.device.synchronize()
    # Calls that ran mostly beside copies, as they may on busy cores, tell of the memory that both share.
    assert (costs.cpu_seconds(work), costs.slowdowns(1e9)) != cpu
    assert costs.link_seconds(4096) > link  # the fake device takes 0.1 ms for any copy
    rig.settle()
    assert not scheduler.timeline.arrivals()
