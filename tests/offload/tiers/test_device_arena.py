"""Slots on devices: what is allocated when, what is refused, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_local.cache.errors import DoesNotFitError
from moe_local.offload.tiers import device_arena
from moe_local.offload.tiers.device_arena import DeviceArena

Make = Callable[..., Any]
SLOTS, STRIDES = [3, 2, 3], [4096, 8192, 12288]
TOTAL = 3 * 4096 + 2 * 8192 + 3 * 12288


def fill(arena: DeviceArena) -> dict[tuple[int, int], int]:
    """A number of its own in every byte of each slot."""
    places = [(layer, slot) for layer, count in enumerate(arena.slots) for slot in range(count)]
    for number, place in enumerate(places):
        arena.buffer(*place).fill_(number)
    return {place: number for number, place in enumerate(places)}


def check(arena: DeviceArena, numbers: dict[tuple[int, int], int]) -> None:
    arena.check_integrity()
    for layer, count in enumerate(arena.slots):
        for slot in range(count):
            buffer = arena.buffer(layer, slot)
            assert buffer.numel() == arena.strides[layer]
            assert bool((buffer == numbers[layer, slot]).all())


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot is a segment of its own."""
    monkeypatch.setattr(device_arena, "SEGMENT_BYTES", 1)


def test_slots_share_no_byte_and_waste_none(make_device: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    device = make_device()
    arena = DeviceArena(SLOTS, STRIDES, device)
    assert arena.slots == (3, 2, 3)
    assert arena.nbytes == device.allocated == TOTAL
    check(arena, fill(arena))
    assert arena.buffer(2, 1) is arena.buffer(2, 1)
    left: list[int] = []
    monkeypatch.setattr(device, "trim", lambda: left.append(device.allocated))
    arena.close()
    arena.close()
    assert device.allocated == 0
    assert left == [0]  # the driver, too, gets it back, once all of it is free


def test_segments_are_about_as_large_as_wanted(make_device: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    device = make_device()
    allocate = device.allocate
    monkeypatch.setattr(device, "allocate", lambda nbytes: sizes.append(nbytes) or allocate(nbytes))
    monkeypatch.setattr(device_arena, "SEGMENT_BYTES", 1 << 16)
    DeviceArena([40] * 8, [4096] * 8, device, least=[2] * 8)
    assert sizes == [40960] * 32
    sizes.clear()
    DeviceArena([400] * 8, [4096] * 8, device, least=[2] * 8)
    assert sizes == [1 << 16] * 200


@pytest.mark.usefixtures("small_segments")
def test_the_highest_slots_of_the_last_layers_come_back_first(make_device: Make) -> None:
    device = make_device()
    arena = DeviceArena(SLOTS, STRIDES, device, least=[1, 1, 1])
    numbers = fill(arena)
    addresses = {place: arena.buffer(*place).data_ptr() for place in numbers}
    seen = []
    while (left := arena.next_to_go(device)) is not None:
        freed = arena.give_back(device)
        seen.append(dict(left))
        assert freed == STRIDES[next(iter(left))]
        assert arena.nbytes == device.allocated
        assert all(arena.slots[layer] == count for layer, count in left.items())
        check(arena, numbers)
    assert seen == [{2: 2}, {0: 2}, {2: 1}, {1: 1}, {0: 1}]
    assert arena.slots == (1, 1, 1)
    assert all(arena.buffer(layer, 0).data_ptr() == addresses[layer, 0] for layer in range(3))
    assert device.allocated == sum(STRIDES)


def test_without_a_least_nothing_comes_back(make_device: Make) -> None:
    device = make_device()
    assert DeviceArena(SLOTS, STRIDES, device).next_to_go(device) is None


@pytest.mark.usefixtures("small_segments")
def test_a_refusal_half_way_keeps_what_there_is(make_device: Make) -> None:
    device = make_device(capacity=TOTAL - 1)
    arena = DeviceArena(SLOTS, STRIDES, device, least=[2, 2, 2])
    assert arena.slots == (3, 2, 2)
    assert device.allocated == TOTAL - 12288
    check(arena, fill(arena))
    for capacity in range(1024, TOTAL, 2048):
        device = make_device(capacity=capacity)
        try:
            arena = DeviceArena(SLOTS, STRIDES, device, least=[1, 1, 1], spare=9000)
        except DoesNotFitError:
            assert device.allocated == 0
            assert capacity < sum(STRIDES) + 9000 + 12288
        else:
            assert min(arena.slots) >= 1
            assert device.allocated <= capacity - 9000
            check(arena, fill(arena))
        arena.close()


def test_a_refusal_of_the_least_is_an_error_and_leaves_nothing(make_device: Make) -> None:
    device = make_device(capacity=TOTAL - 1)
    with pytest.raises(DoesNotFitError, match="refused"):
        DeviceArena(SLOTS, STRIDES, device)
    assert device.allocated == 0
    device = make_device(capacity=sum(STRIDES) - 1)
    with pytest.raises(DoesNotFitError, match="refused"):
        DeviceArena(SLOTS, STRIDES, device, least=[1, 1, 1])
    assert device.allocated == 0


def test_a_device_that_gives_too_little_is_noticed(
    make_device: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_device()
    monkeypatch.setattr(device, "allocate", lambda nbytes: torch.empty(nbytes - 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        DeviceArena(SLOTS, STRIDES, device)


def test_each_layer_lies_on_its_device_and_gives_way_there(make_device: Make) -> None:
    first, second = make_device(), make_device()
    arena = DeviceArena([5] * 4, [4096] * 4, [first, first, second, second], least=[1] * 4)
    assert first.allocated == second.allocated == 2 * 5 * 4096
    numbers = fill(arena)
    while arena.next_to_go(second) is not None:
        arena.give_back(second)
        check(arena, numbers)
    assert arena.slots == (5, 5, 1, 1)
    assert (first.allocated, second.allocated) == (2 * 5 * 4096, 2 * 4096)
    arena.close()
    assert (first.allocated, second.allocated) == (0, 0)


def test_one_card_that_is_short_takes_nothing_from_the_other(make_device: Make) -> None:
    first, second = make_device(capacity=2 * 3 * 4096), make_device()
    arena = DeviceArena([5] * 4, [4096] * 4, [first, first, second, second], least=[2] * 4)
    assert arena.slots == (3, 3, 5, 5)
    arena.check_integrity()


@given(
    slots=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    strides=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    size=st.integers(1, 100),
    capacity=st.integers(0, 200),
    least=st.integers(0, 2),
    cards=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_any_arena_under_any_capacity(
    make_device: Make,
    slots: list[int],
    strides: list[int],
    size: int,
    capacity: int,
    least: int,
    cards: list[bool],
) -> None:
    two = [make_device(capacity=capacity), make_device(capacity=2 * capacity)]
    devices = [two[card] for card in cards[: len(slots)]]
    floor = [min(least, count) for count in slots]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_arena, "SEGMENT_BYTES", size)
        try:
            arena = DeviceArena(slots, strides[: len(slots)], devices, least=floor)
        except DoesNotFitError:
            assert two[0].allocated == two[1].allocated == 0
            return
    numbers = fill(arena)
    for device in dict.fromkeys(devices):
        check(arena, numbers)
        while arena.next_to_go(device) is not None:
            arena.give_back(device)
            check(arena, numbers)
            assert arena.nbytes == two[0].allocated + two[1].allocated
    assert all(low <= have <= asked for low, have, asked in zip(floor, arena.slots, slots, strict=True))
