"""The memory of slots: exact size, no overlap, given back on close."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_local.cache.errors import DoesNotFitError
from moe_local.offload.tiers.arena import Arena, DeviceArena, HostArena, arena_bytes

SLOTS, STRIDES = [2, 0, 3], [4096, 8192, 12288]


def every_slot() -> list[tuple[int, int]]:
    return [(layer, slot) for layer, count in enumerate(SLOTS) for slot in range(count)]


def test_slots_share_no_byte_and_waste_none() -> None:
    arena = HostArena(SLOTS, STRIDES)
    assert arena.nbytes == arena_bytes(SLOTS, STRIDES) == 2 * 4096 + 3 * 12288
    for number, (layer, slot) in enumerate(every_slot()):
        assert arena.buffer(layer, slot).numel() == STRIDES[layer]
        arena.buffer(layer, slot).fill_(number)
    seen = []
    for number, (layer, slot) in enumerate(every_slot()):
        assert bool((arena.buffer(layer, slot) == number).all())
        seen.append((arena.offset(layer, slot), arena.offset(layer, slot) + STRIDES[layer]))
    seen.sort()
    assert seen[0][0] == 0
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(seen))
    assert seen[-1][1] == arena.nbytes
    arena.close()


def test_host_views_are_the_same_memory_and_page_aligned() -> None:
    arena = HostArena(SLOTS, STRIDES)
    for layer, slot in every_slot():
        view = arena.view(layer, slot)
        assert not view.readonly
        assert len(view) == STRIDES[layer]
        view[:3] = b"abc"
        view[-1] = 7
        assert bytes(arena.buffer(layer, slot)[:3].numpy()) == b"abc"
        assert int(arena.buffer(layer, slot)[-1]) == 7
        assert arena.buffer(layer, slot).data_ptr() % 4096 == 0
    del view
    arena.close()


def test_a_buffer_is_one_tensor_made_once() -> None:
    arena = HostArena(SLOTS, STRIDES)
    assert arena.buffer(2, 1) is arena.buffer(2, 1)


def test_device_arenas_take_their_memory_from_the_device(make_device: Callable[..., Any]) -> None:
    device = make_device()
    arena = DeviceArena(SLOTS, STRIDES, device)
    assert arena.nbytes == arena_bytes(SLOTS, STRIDES)
    assert int(arena.buffer(2, 2)[-1]) == 0xA5
    arena.close()
    arena.close()


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Arena([2], [100], torch.empty(199, dtype=torch.uint8))


def test_more_than_the_system_has_is_one_clear_line() -> None:
    with pytest.raises(DoesNotFitError, match="smaller --ram") as info:
        HostArena([1], [1 << 60])
    assert "\n" not in str(info.value)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory by /proc")
def test_close_gives_the_memory_back_while_the_arena_is_still_held() -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    size = 64 << 20
    arena = HostArena([4], [size // 4])
    for slot in range(4):
        arena.buffer(0, slot).fill_(1)
    full = resident()
    arena.close()
    arena.close()
    gc.collect()
    assert full - resident() > size * 3 // 4
    assert arena.nbytes == size  # what it had, for whoever asks


def test_no_slot_crosses_a_cut() -> None:
    """Memory is pinned from cut to cut, and one copy must not touch two ranges."""
    arena = HostArena([3, 1, 5], [4096, 8192, 12288])
    for nbytes in (1, 4096, 10_000, 30_000, 1 << 30):
        cuts = arena.cuts(nbytes)
        assert (cuts[0], cuts[-1]) == (0, arena.nbytes)
        assert cuts == sorted(set(cuts))
        for layer, (count, stride) in enumerate([(3, 4096), (1, 8192), (5, 12288)]):
            for slot in range(count):
                start = arena.offset(layer, slot)
                assert not any(start < cut < start + stride for cut in cuts)
    arena.close()
