"""The memory of slots: exact size, no overlap, given back on close."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_local.cache.errors import DoesNotFitError
from moe_local.offload.tiers import arena as arena_module
from moe_local.offload.tiers import device as device_module
from moe_local.offload.tiers.arena import HostArena

SLOTS, STRIDES = [2, 0, 3], [4096, 8192, 12288]


def every_slot() -> list[tuple[int, int]]:
    return [(layer, slot) for layer, count in enumerate(SLOTS) for slot in range(count)]


def test_slots_share_no_byte_and_waste_none() -> None:
    arena = HostArena(SLOTS, STRIDES)
    assert arena.nbytes == 2 * 4096 + 3 * 12288
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


def test_no_page_of_a_system_with_large_ones_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module.mmap, "PAGESIZE", 65536)
    arena = HostArena([80, 7, 12], [3 * 4096, 5 * 4096, 16 * 4096])
    cuts = arena.cuts(100_000)
    assert len(cuts) > 3
    assert all(cut % 65536 == 0 for cut in cuts[:-1])
    assert cuts[-1] == arena.nbytes
    arena.close()


class Cudart:
    """CUDA's registration of host memory, which has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.ranges: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        assert flags == 1 | 2  # for every card, and for kernels
        assert pointer % 4096 == 0
        assert nbytes > 0
        assert not any(a < pointer + nbytes and pointer < a + n for a, n in self.ranges.items())
        if sum(self.ranges.values()) + nbytes > self.room:
            return 2  # cudaErrorMemoryAllocation, which is also what a lack of VRAM is called
        self.ranges[pointer] = nbytes
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.ranges[pointer]
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Cudart]:
    """cudart(room) -> a CUDA runtime that pins so many bytes; `forgotten` counts errors that were cleared."""

    def make(room: int) -> Cudart:
        runtime = Cudart(room)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        return runtime

    return make


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that CUDA's last error was cleared."""
    found: list[None] = []
    monkeypatch.setattr(device_module, "_forget_cuda_error", lambda: found.append(None))
    monkeypatch.setattr(arena_module, "PIN_BYTES", 20_000)
    return found


def test_pinning_covers_the_arena_exactly(
    cudart: Callable[[int], Cudart], forgotten: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    runtime = cudart(1 << 40)
    arena = HostArena([3, 1, 5], [4096, 8192, 12288], pin=True)
    assert arena.memory.pinned_bytes == arena.nbytes == sum(runtime.ranges.values())
    assert len(runtime.ranges) == len(arena.cuts(20_000)) - 1 == 4
    assert min(runtime.ranges) == arena.buffer(0, 0).data_ptr()
    arena.close()
    assert runtime.ranges == {}
    assert forgotten == []
    assert not caplog.records


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_no_forked_process_has_a_part_in_what_is_pinned(
    cudart: Callable[[int], Cudart], forgotten: list[None]
) -> None:
    """Or a slot that is written after a fork would be another page than the one that the device reads."""
    cudart(1 << 40)

    def flags(arena: HostArena) -> set[str]:
        """Of the mapping that its memory is in."""
        address, inside = arena.buffer(0, 0).data_ptr(), False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(found[1], 16) <= address < int(found[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:])
        raise AssertionError("no mapping")

    plain, pinned = HostArena([2], [4096]), HostArena([2], [4096], pin=True)
    assert ("dc" in flags(plain), "dc" in flags(pinned)) == (False, True)  # "do not copy area on fork"
    plain.close()
    pinned.close()


@pytest.mark.parametrize("room", [0, 20_479, 24_576, 40_000, 81_919])
def test_a_refusal_half_way_leaves_the_rest_pageable_and_says_so_once(
    cudart: Callable[[int], Cudart], forgotten: list[None], caplog: pytest.LogCaptureFixture, room: int
) -> None:
    runtime = cudart(room)
    arena = HostArena([3, 1, 5], [4096, 8192, 12288], pin=True)
    pinned = sum(runtime.ranges.values())
    assert arena.memory.pinned_bytes == pinned < arena.nbytes
    # What is pinned is one stretch from the start on, and something is left for other pinned buffers.
    if pinned:
        assert min(runtime.ranges) == arena.buffer(0, 0).data_ptr()
        assert pinned + max(runtime.ranges.values()) <= room + 12288
    assert len(forgotten) == len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "\n" not in message
    assert "VRAM is not what lacks" in message
    assert (
        f"copies of the other {100 * (arena.nbytes - pinned) / arena.nbytes:.0f} % are about half as"
        in message
    )
    assert "ulimit -l" in message
    arena.buffer(2, 4).fill_(7)  # usable all the same
    arena.close()
    assert runtime.ranges == {}


def test_the_cost_of_pageable_copies_is_measured_where_it_can_be(
    cudart: Callable[[int], Cudart],
    forgotten: list[None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart(60_000)
    rates = iter((24.6e9, 9.12e9))
    seen: list[int] = []
    monkeypatch.setattr(device_module, "copy_rate", lambda memory: seen.append(memory.numel()) or next(rates))
    arena = HostArena([3, 1, 5], [4096, 8192, 12288], pin=True)
    assert seen == [arena.memory.pinned_bytes, arena.nbytes - arena.memory.pinned_bytes]
    assert "9.12 instead of 24.6 GB/s" in caplog.records[0].getMessage()
    arena.close()


def test_where_windows_has_the_card_less_vram_is_the_remedy(
    cudart: Callable[[int], Cudart],
    forgotten: list[None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It counts pinned memory as the card's."""
    monkeypatch.setattr(device_module, "_is_windows", lambda: True)
    cudart(40_000)
    HostArena([3, 1, 5], [4096, 8192, 12288], pin=True).close()
    (line,) = (record.getMessage() for record in caplog.records)
    assert "set a smaller --vram" in line
    assert "not what lacks" not in line


def test_without_a_gpu_no_copy_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_module.copy_rate(torch.ones(4096, dtype=torch.uint8)) is None
