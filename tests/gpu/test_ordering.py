"""Orders that only a CUDA device can break: what runs late there is made to run late."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from moe_local.offload.engine.graphs import CudaGraphs
from moe_local.offload.engine.sampling import draw
from moe_local.offload.plan.bandwidth import h2d_bandwidth
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.device import CudaDevice, HostMemory, copy_rate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NBYTES = 64 << 20
LONG = 200_000_000
"""Cycles: a tenth of a second."""


@pytest.fixture
def device() -> CudaDevice:
    return CudaDevice(torch.device("cuda", torch.cuda.current_device()))


def pinned(number: int) -> torch.Tensor:
    return torch.full((NBYTES,), number, dtype=torch.uint8).pin_memory()


def test_a_copy_into_memory_that_came_free_waits_for_its_last_kernels(device: CudaDevice) -> None:
    source, old = pinned(7), device.allocate(NBYTES)
    address = old.fill_(1).data_ptr()
    old.sum()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    seen = old.sum()
    del old
    new = device.allocate(NBYTES)
    assert new.data_ptr() == address
    device.copy(new, source, None).synchronize()
    assert seen.item() == NBYTES
    assert new.sum().item() == 7 * NBYTES


def test_a_copy_waits_for_readers_and_kernels_for_the_copy(device: CudaDevice) -> None:
    """A hundred experts through one slot, the host far ahead of both streams."""
    slot = device.allocate(NBYTES)
    sources = [pinned(number) for number in range(1, 6)]
    slot.fill_(0)
    torch.cuda._sleep(LONG)
    sums: list[torch.Tensor] = []
    reader = device.record()
    for number in range(100):
        copied = device.copy(slot, sources[number % 5], reader)
        device.wait(copied)
        sums.append(slot.sum())
        reader = device.record()
    assert torch.stack(sums).tolist() == [NBYTES * (1 + number % 5) for number in range(100)]


def test_models_in_two_threads_capture_and_draw(device: CudaDevice) -> None:
    """Each finds what it did in its own graphs, and nothing of the other."""
    errors: list[BaseException] = []
    card = device.torch_device
    torch.multinomial(torch.ones(1, 8, device=card), 1)
    torch.ones(8, 8, device=card) @ torch.ones(8, 8, device=card)

    def work(factor: float) -> None:
        try:
            graphs, x = CudaGraphs(card), torch.ones(1000, device=card)
            kept: list[Any] = []
            for number in range(40):
                with graphs.session():
                    graphs.begin()
                    y = x * factor + number
                    kept.append((graphs.end(), y, factor + number))
                draw(torch.ones(1, 8, device=card), None)
                for graph, result, value in kept[-3:]:
                    result.zero_()
                    graph.replay()
                    assert result.unique().tolist() == [value]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (3.0, 1000.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


def test_a_link_is_measured_while_another_thread_captures(device: CudaDevice) -> None:
    card, rates = device.torch_device, list[float]()
    graphs, x = CudaGraphs(card), torch.ones(1000, device=card)
    memory = HostMemory(NBYTES)
    with graphs.session():
        graphs.begin()
        y = x * 3

        def measure() -> None:
            rates.append(h2d_bandwidth(card))
            rates.append(copy_rate(memory.tensor) or 0)

        other = threading.Thread(target=measure)
        other.start()
        other.join(60)
        graph = graphs.end()
    graph.replay()
    assert y.unique().tolist() == [3]
    assert len(rates) == 2
    assert all(rates)
    memory.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_slot_in_ram_that_is_written_after_a_fork_is_what_is_copied(device: CudaDevice) -> None:
    arena = HostArena([4], [NBYTES // 4], pin=True)
    there = device.allocate(NBYTES // 4)
    for slot in range(4):
        arena.buffer(0, slot).fill_(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # stays while its parent writes
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        for slot in range(4):
            arena.buffer(0, slot).fill_(50 + slot)
            device.copy(there, arena.buffer(0, slot), None).synchronize()
            assert there.unique().tolist() == [50 + slot]
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)
        arena.close()
