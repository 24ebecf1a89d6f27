from __future__ import annotations

import ctypes
import json
import os
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from moe_local.offload.native.library import library
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.bandwidth import Bandwidths


def test_defaults_are_assumed():
    assert Bandwidths().assumed(["ram"])
    assert not Bandwidths(measured=frozenset({"ram", "disk"})).assumed(["ram", "disk"])
    assert Bandwidths(measured=frozenset({"ram"})).assumed(["ram", "disk"])


def test_measure_without_a_gpu(tmp_path):
    def measure():
        """And whether it took less than two seconds of each thread, and found a machine that moves."""
        start = time.process_time()
        found = bandwidth.measure(tmp_path)
        taken = time.process_time() - start
        assert found.measured == {"ram", "disk"}
        assert (found.vram, found.h2d) == (bandwidth.DEFAULT_VRAM, bandwidth.DEFAULT_H2D)
        assert list(tmp_path.iterdir()) == [], "the probe file must go"
        return taken < 2 * max(1, torch.get_num_threads()) and found.ram > 1e8 and found.disk > 1e6

    # Of the CPU's time, but a machine that stands still may count that as well.
    assert any(measure() for _ in range(10))


def test_ram_is_never_slower_than_a_plain_copy_would_allow():
    buffer, copy = torch.ones(2**23, dtype=torch.int64), torch.empty(2**23, dtype=torch.int64)
    start = time.perf_counter()
    copy.copy_(buffer)
    copied = buffer.nbytes / (time.perf_counter() - start)
    # Whoever else uses the memory at the time, some attempt meets a pause.
    assert any(bandwidth.ram_bandwidth(buffer.nbytes) > copied / 3 for _ in range(20))


def test_the_buffer_in_ram_is_longer_than_the_caches_together(tmp_path, monkeypatch):
    for cpu, size, shared in (
        (0, "327680K", "0-1"),
        (1, "327680K", "0-1"),
        (2, "65536K", "2"),
        (3, "?", "3"),
    ):
        cache = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "size").write_text(f"{size}\n")
        (cache / "shared_cpu_list").write_text(f"{shared}\n")
    (tmp_path / "cpufreq" / "cache" / "index3").mkdir(parents=True)
    mib = 2**20
    assert bandwidth.last_level_caches(tmp_path) == (320 + 64) * mib
    assert bandwidth.last_level_caches(tmp_path / "absent") == 0
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=128 << 30))
    assert bandwidth.beyond_caches(384 * mib) == 4 * 384 * mib
    assert bandwidth.beyond_caches(32 * mib) == bandwidth.RAM_BUFFER
    assert bandwidth.beyond_caches(1200 * mib) == bandwidth.MOST_RAM_BUFFER
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 << 30))
    assert bandwidth.beyond_caches(384 * mib) == 512 * mib
    read = []
    monkeypatch.setattr(bandwidth, "last_level_caches", lambda: 100 * mib)
    monkeypatch.setattr(bandwidth, "read_sum", lambda buffer: read.append(buffer.nbytes))
    bandwidth.ram_bandwidth()
    assert set(read) == {400 * mib}


@pytest.mark.parametrize("words", [0, 1, 15, 16, 17, 3 * 2**17 + 5])
@pytest.mark.parametrize("compiled", [True, False])
def test_every_word_is_read_once(words, compiled, monkeypatch):
    """Sizes around the reader's vectors and chunks; sums beyond 2^63; with and without the C++ library."""
    if compiled and library() is None:
        pytest.skip("the C++ library was not compiled")
    if not compiled:
        monkeypatch.setattr(bandwidth, "library", lambda: None)
    buffer = torch.randint(-(2**63), 2**63 - 1, (words,), generator=torch.Generator().manual_seed(words))
    assert bandwidth.read_sum(buffer) == sum(buffer.tolist()) % 2**64


def test_bytes_beyond_the_last_word_are_read():
    lib = library()
    if lib is None:
        pytest.skip("the C++ library was not compiled")
    memory = torch.arange(1, 2**20 + 31, dtype=torch.int64).to(torch.uint8)[1:]  # misaligned, 29 left over
    total = ctypes.c_uint64()
    for threads in (1, 3):
        assert lib.moe_read(memory.data_ptr(), memory.numel(), ctypes.byref(total), threads) == 0
        filled = torch.nn.functional.pad(memory, (0, -memory.numel() % 8)).clone()
        assert total.value == sum(filled.view(torch.int64).tolist()) % 2**64
    assert lib.moe_read(None, 8, ctypes.byref(total), 1) == 1
    assert lib.moe_read(memory.data_ptr(), -1, ctypes.byref(total), 1) == 1
    assert lib.moe_read(memory.data_ptr(), 8, None, 1) == 1


def test_a_disk_that_cannot_be_written_keeps_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "SECONDS", 0.02)
    file = tmp_path / "not-a-folder"
    file.write_text("")
    found = bandwidth.measure(file / "below")
    assert found.measured == {"ram"}
    assert found.disk == bandwidth.DEFAULT_DISK


def test_without_direct_reads_the_disk_figure_says_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "open_directly", lambda name: None)
    rate, cached = bandwidth.disk_bandwidth(tmp_path, nbytes=8 * 2**20)
    assert rate > 0
    assert cached


def test_only_what_is_assumed_is_measured_and_a_full_device_keeps_its_default(monkeypatch):
    def full(device: torch.device) -> float:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bandwidth, "ram_bandwidth", lambda: 5e10)
    monkeypatch.setattr(bandwidth, "h2d_bandwidth", lambda device: 2e10)
    monkeypatch.setattr(bandwidth, "vram_bandwidth", full)
    known = Bandwidths(ram=1e10, disk=1e9, measured=frozenset({"ram", "disk"}))
    found = bandwidth.measure_links(known, torch.device("cuda", 0))
    assert (found.ram, found.h2d, found.disk, found.vram) == (1e10, 2e10, 1e9, bandwidth.DEFAULT_VRAM)
    assert found.measured == {"ram", "h2d", "disk"}


def test_launches_and_waits_are_no_part_of_a_fast_gpus_bandwidth(monkeypatch):
    """An H200's, by a clock of its own: 4.8 TB/s, five microseconds to launch when idle, five to wait."""
    now = [0.0]

    class Buffer:
        idle = True

        def sum(self) -> None:
            now[0] += bandwidth.RAM_BUFFER / 4.8e12 + 5e-6 * self.idle
            self.idle = False

    def synchronize(device: torch.device) -> None:
        now[0] += 5e-6
        buffer.idle = True

    buffer = Buffer()
    monkeypatch.setattr(torch, "ones", lambda *sizes, **options: buffer)
    monkeypatch.setattr(bandwidth, "_synchronize", synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert 0.97 * 4.8e12 < bandwidth.vram_bandwidth(torch.device("cuda", 0)) < 4.8e12


def test_what_is_saved_is_found_again(tmp_path):
    assert bandwidth.saved(tmp_path) == Bandwidths()
    figures = Bandwidths(ram=1.5e10, measured=frozenset({"ram"}))
    path = bandwidth.save(figures, tmp_path)
    assert bandwidth.saved(tmp_path) == figures
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_machines_share_a_folder(tmp_path, monkeypatch):
    bandwidth.save(Bandwidths(ram=1e10, measured=frozenset({"ram"})), tmp_path)
    monkeypatch.setattr(bandwidth, "_processor", lambda: "Another CPU")
    assert bandwidth.saved(tmp_path) == Bandwidths()
    bandwidth.save(Bandwidths(ram=2e10, measured=frozenset({"ram"})), tmp_path)
    monkeypatch.undo()
    assert bandwidth.saved(tmp_path).ram == 1e10


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"a": 1}'])
def test_a_damaged_file_counts_as_empty(tmp_path, text):
    (tmp_path / bandwidth.FILE_NAME).write_text(text)
    assert bandwidth.saved(tmp_path) == Bandwidths()
    bandwidth.save(Bandwidths(disk=1.0), tmp_path)
    assert bandwidth.saved(tmp_path).disk == 1.0


@pytest.mark.parametrize("kept", [5, {}, {"vram": "fast"}])
def test_a_damaged_entry_counts_as_absent(tmp_path, kept):
    (tmp_path / bandwidth.FILE_NAME).write_text(json.dumps({bandwidth.machine(): kept}))
    assert bandwidth.saved(tmp_path) == Bandwidths()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    bandwidth.save(Bandwidths(ram=1e10), tmp_path)

    def refuse(source: str, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        bandwidth.save(Bandwidths(ram=2e10), tmp_path)
    assert bandwidth.saved(tmp_path).ram == 1e10
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.gpu
def test_measure_with_a_gpu(tmp_path):
    found = bandwidth.measure(tmp_path, torch.device("cuda", 0))
    assert {"vram", "h2d", "ram"} <= found.measured
    assert found.vram > found.h2d > 1e8
