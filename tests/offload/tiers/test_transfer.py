"""Reads from disk: right bytes, priorities, cancellation, failures, threads."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from moe_local.cache.errors import OptionError, TransferError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.system.pages import PAGE
from moe_local.offload.system.patience import PATIENCE_S, Patience
from moe_local.offload.tiers import transfer
from moe_local.offload.tiers.checksum import RunningChecksum
from moe_local.offload.tiers.location import Location
from moe_local.offload.tiers.transfer import DEMAND, FileSource, Load, LoadState

Make = Callable[..., Any]
EXPERT = 10_000


class Disk:
    """Experts of EXPERT bytes in one file, a slot of memory for each layer and slot, and a FileSource."""

    def __init__(self, folder: Path, experts: int = 8, slots: int = 8, **options: Any) -> None:
        self.path = folder / "experts"
        self.content = [random.Random(i).randbytes(EXPERT) for i in range(experts)]
        self.path.write_bytes(b"".join(self.content))
        self.memory = [bytearray(EXPERT + 100) for _ in range(slots)]
        self.source = FileSource(
            self.locate, lambda layer, slot: memoryview(self.memory[slot]), **{"piece_bytes": 4000, **options}
        )

    def locate(self, key: ExpertKey) -> Location:
        digest = xxhash.xxh3_64_intdigest(self.content[key.expert])
        return Location(self.path, key.expert * EXPERT, EXPERT, digest)

    def start(self, expert: int, slot: int | None = None, priority: int = DEMAND) -> Load:
        return self.source.start(ExpertKey(0, expert), expert if slot is None else slot, priority)

    def end(self, *loads: Load) -> list[LoadState]:
        """Wait for these loads, and only these, to turn up in `finished`."""
        found: list[Load] = []
        deadline = time.monotonic() + 100
        while len(found) < len(loads) and time.monotonic() < deadline:
            self.source.wait(0.1)
            while self.source.finished:
                found.append(self.source.finished.popleft())
            self.source.check_integrity()
        assert {id(load) for load in found} == {id(load) for load in loads}
        assert len(found) == len(loads)
        return [load.state for load in loads]

    def holds(self, slot: int, expert: int) -> bool:
        return bytes(self.memory[slot][:EXPERT]) == self.content[expert]


@pytest.fixture
def make_disk(tmp_path: Path, read_gate: Any) -> Any:
    disks: list[Disk] = []

    def make(**options: Any) -> Disk:
        disks.append(Disk(tmp_path, **options))
        return disks[-1]

    yield make
    read_gate.open()
    for disk in disks:
        disk.source.close()


def pieces_of(gate: Any) -> list[tuple[int, int]]:
    """(expert, piece) of each read, in the order in which the threads came with it."""
    return [(at // EXPERT, at % EXPERT // 4000) for at in gate.arrived]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("piece_bytes", [999, 4000, EXPERT, 1 << 20])
def test_brings_the_right_bytes_reading_each_once(
    make_disk: Any, read_gate: Any, threads: int, piece_bytes: int
) -> None:
    disk = make_disk(threads=threads, piece_bytes=piece_bytes)
    loads = [disk.start(expert) for expert in range(8)]
    assert disk.end(*loads) == [LoadState.DONE] * 8
    assert all(disk.holds(expert, expert) for expert in range(8))
    assert all(bytes(slot[EXPERT:]) == bytes(100) for slot in disk.memory), "wrote past the expert"
    assert [load.moved for load in loads] == [EXPERT] * 8
    assert disk.source.bytes_read == 8 * EXPERT
    assert sorted(read_gate.arrived) == [
        e * EXPERT + at for e in range(8) for at in range(0, EXPERT, piece_bytes)
    ]


def test_goes_on_after_short_reads(make_disk: Any, read_gate: Any) -> None:
    read_gate.most = 777
    disk = make_disk()
    assert disk.end(disk.start(3)) == [LoadState.DONE]
    assert disk.holds(3, 3)


def test_demand_overtakes_what_is_queued_after_the_piece_in_flight(make_disk: Any, read_gate: Any) -> None:
    disk = make_disk(threads=1)
    read_gate.shut()
    near, far = disk.start(0, priority=1), disk.start(1, priority=2)
    read_gate.wait_for(1)
    demand = disk.start(2)
    read_gate.open()
    disk.end(near, far, demand)
    assert pieces_of(read_gate) == [(0, 0), (2, 0), (2, 1), (2, 2), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_promotion_moves_a_queued_load_forward_without_reading_twice(make_disk: Any, read_gate: Any) -> None:
    disk = make_disk(threads=1)
    read_gate.shut()
    loads = [disk.start(expert, priority=1 + expert) for expert in range(3)]
    read_gate.wait_for(1)
    disk.source.promote(loads[2], DEMAND)
    disk.source.promote(loads[1], 9)  # less urgent than it is: nothing changes
    read_gate.open()
    disk.end(*loads)
    assert pieces_of(read_gate) == [(0, 0), (2, 0), (2, 1), (2, 2), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [load.priority for load in loads] == [1, 2, DEMAND]


def test_what_is_cancelled_in_the_queue_is_never_read(make_disk: Any, read_gate: Any) -> None:
    disk = make_disk(threads=1)
    read_gate.shut()
    first, second = disk.start(0), disk.start(1)
    read_gate.wait_for(1)
    disk.source.cancel(second)
    assert disk.end(second) == [LoadState.CANCELLED]
    disk.source.cancel(second)  # again, and after its end: nothing more turns up
    read_gate.open()
    assert disk.end(first) == [LoadState.DONE]
    assert [expert for expert, _ in pieces_of(read_gate)] == [0, 0, 0]
    assert bytes(disk.memory[1]) == bytes(EXPERT + 100)


def test_a_cancelled_load_ends_only_when_nobody_writes_any_more(make_disk: Any, read_gate: Any) -> None:
    disk = make_disk(threads=2)
    read_gate.shut()
    load = disk.start(0)
    read_gate.wait_for(2)
    disk.source.cancel(load)
    read_gate.let(1)
    disk.source.wait(0.05)
    assert not load.finished
    assert not disk.source.finished
    disk.source.check_integrity()
    read_gate.open()
    assert disk.end(load) == [LoadState.CANCELLED]
    assert 0 < load.moved < EXPERT
    assert disk.end(disk.start(5, slot=0)) == [LoadState.DONE]
    time.sleep(0.02)
    assert disk.holds(0, 5)
    assert disk.source.bytes_read == load.moved + EXPERT


def test_a_load_cancelled_while_it_is_checked_keeps_its_slot_until_then(
    make_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk()
    hashing, go_on = threading.Event(), threading.Event()
    add = RunningChecksum.add

    def slow(self: RunningChecksum, part: memoryview) -> None:
        hashing.set()
        assert go_on.wait(100)
        add(self, part)

    monkeypatch.setattr(RunningChecksum, "add", slow)
    load = disk.start(0)
    assert hashing.wait(100)
    deadline = time.monotonic() + 100
    while load.left and time.monotonic() < deadline:
        time.sleep(0.001)
    disk.source.cancel(load)
    disk.source.check_integrity()
    assert not load.finished
    go_on.set()
    assert disk.end(load) == [LoadState.DONE]  # all of it is there: nothing is gained by forgetting it


def test_a_load_cancelled_half_way_waits_for_whoever_hashes_its_slot(
    make_disk: Any, read_gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk(threads=2)
    hashing, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(RunningChecksum, "add", lambda self, part: hashing.set() or go_on.wait(100))
    read_gate.shut()
    load = disk.start(0)
    read_gate.let(1)
    assert hashing.wait(100)
    disk.source.cancel(load)
    read_gate.open()
    disk.source.wait(0.05)
    assert not load.finished
    go_on.set()
    assert disk.end(load) == [LoadState.CANCELLED]
    disk.source.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_parts_in_any_order_have_the_checksum_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    content = rng.randbytes(rng.randrange(1, 5000))
    cuts = sorted({0, len(content), *(rng.randrange(len(content)) for _ in range(rng.randrange(8)))})
    parts = list(itertools.pairwise(cuts))
    rng.shuffle(parts)
    check = RunningChecksum(memoryview(content))
    claimed: memoryview | None = None
    added = 0
    while parts or claimed is not None or not check.complete:
        if parts and rng.random() < 0.6:
            start, end = parts.pop()
            check.arrived(start, end - start)
        if claimed is not None and rng.random() < 0.5:
            check.add(claimed)
            added += len(claimed)
            check.added()
            claimed = None
        elif claimed is None:
            claimed = check.claim()
            assert claimed is None or bytes(claimed) == content[added : added + len(claimed)]
        else:
            assert check.claim() is None  # one at a time
    assert check.digest() == xxhash.xxh3_64_intdigest(content)


def test_a_read_error_fails_its_load_only(make_disk: Any, read_gate: Any) -> None:
    disk = make_disk()
    read_gate.errors[EXPERT + 4000] = OSError(errno.EIO, os.strerror(errno.EIO))
    good, bad = disk.start(0), disk.start(1)
    assert disk.end(good, bad) == [LoadState.DONE, LoadState.FAILED]
    assert isinstance(bad.error, TransferError)
    message = str(bad.error)
    assert "expert 1 of MoE layer 0" in message
    assert "Input/output error" in message
    assert "\n" not in message
    read_gate.errors.clear()
    assert disk.end(disk.start(1)) == [LoadState.DONE]
    assert disk.holds(1, 1)


def test_any_exception_of_a_read_fails_the_load_and_leaves_the_thread_alive(
    make_disk: Any, read_gate: Any
) -> None:
    disk = make_disk(threads=1)
    read_gate.errors[0] = ValueError("unheard of")
    load = disk.start(0)
    assert disk.end(load) == [LoadState.FAILED]
    assert "unheard of" in str(load.error)
    assert disk.end(disk.start(1)) == [LoadState.DONE]


def test_a_file_cut_while_open_fails_the_load_and_serves_again_when_mended(make_disk: Any) -> None:
    disk = make_disk()
    disk.end(disk.start(0))
    whole = disk.path.read_bytes()
    os.truncate(disk.path, 7 * EXPERT + 5000)
    load = disk.start(7)
    assert disk.end(load) == [LoadState.FAILED]
    assert "cut off" in str(load.error)
    assert "expert 7" in str(load.error)
    with open(disk.path, "r+b") as file:
        file.write(whole)
    assert disk.end(disk.start(7)) == [LoadState.DONE]
    assert disk.holds(7, 7)


def test_a_flipped_byte_fails_the_first_read(make_disk: Any) -> None:
    disk = make_disk()
    whole = disk.path.read_bytes()
    broken = bytearray(whole)
    broken[2 * EXPERT + 9999] ^= 1
    disk.path.write_bytes(broken)
    load = disk.start(2)
    assert disk.end(load) == [LoadState.FAILED]
    assert "wrong checksum" in str(load.error)
    assert "expert 2" in str(load.error)
    disk.path.write_bytes(whole)
    assert disk.end(disk.start(2)) == [LoadState.DONE]
    assert disk.holds(2, 2)


def test_an_expert_is_checked_once(make_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = make_disk()
    add, checked = RunningChecksum.add, []

    def counted(self: RunningChecksum, part: memoryview) -> None:
        checked.append(len(part))
        add(self, part)

    monkeypatch.setattr(RunningChecksum, "add", counted)
    for _ in range(3):
        disk.end(disk.start(0), disk.start(1))
    assert sum(checked) == 2 * EXPERT


def test_a_missing_file_fails_the_load(make_disk: Any) -> None:
    disk = make_disk()
    disk.path.rename(disk.path.with_name("elsewhere"))
    load = disk.start(0)
    assert disk.end(load) == [LoadState.FAILED]
    assert "is not there any more; load the model again" in str(load.error)
    disk.path.with_name("elsewhere").rename(disk.path)
    assert disk.end(disk.start(0)) == [LoadState.DONE]


def open_files(path: Path) -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files in /proc")
def test_close_joins_threads_and_closes_files_also_with_loads_under_way(
    make_disk: Callable[..., Disk], read_gate: Any
) -> None:
    disk = make_disk(threads=2)
    threads = [*disk.source._threads]
    done = disk.start(0)
    disk.end(done)
    assert open_files(disk.path) == 1
    read_gate.shut()
    loads = [disk.start(expert) for expert in range(1, 6)]
    read_gate.wait_for(5)  # three pieces of the first load came before
    closing = threading.Thread(target=disk.source.close)
    closing.start()
    deadline = time.monotonic() + 100
    while not disk.source._closed and time.monotonic() < deadline:  # or the readers would go on meanwhile
        time.sleep(0.001)
    read_gate.let(2)
    closing.join(100)
    assert not closing.is_alive()
    assert not any(thread.is_alive() for thread in threads)
    assert open_files(disk.path) == 0
    assert all(load.finished for load in loads)
    assert {load.state for load in loads[1:]} == {LoadState.CANCELLED}
    assert sorted(map(id, disk.source.finished)) == sorted(map(id, loads))
    disk.source.close()
    with pytest.raises(RuntimeError, match="closed"):
        disk.start(6)


def test_waiting_ends_with_the_first_load_or_the_time(make_disk: Any, read_gate: Any) -> None:
    disk = make_disk()
    began = time.perf_counter()
    disk.source.wait(0.03)
    assert time.perf_counter() - began >= 0.03
    read_gate.shut()
    load = disk.start(0)
    threading.Timer(0.02, read_gate.open).start()
    began = time.perf_counter()
    disk.source.wait(600)
    assert time.perf_counter() - began < 200
    assert disk.end(load) == [LoadState.DONE]


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_starts_promotions_and_cancellations(make_disk: Any, seed: int) -> None:
    """Slots are given away again as soon as their load has ended; what is done holds the right bytes."""
    rng = random.Random(seed)
    disk = make_disk(slots=4, experts=8, threads=3, piece_bytes=1500)
    under_way: dict[int, Load] = {}
    started = ended = 0
    for _ in range(400):
        free = [slot for slot in range(4) if slot not in under_way]
        absent = [e for e in range(8) if e not in [load.key.expert for load in under_way.values()]]
        if free and rng.random() < 0.5:
            slot = rng.choice(free)
            under_way[slot] = disk.start(rng.choice(absent), slot, rng.randrange(4))
            started += 1
        elif under_way and rng.random() < 0.4:
            disk.source.cancel(rng.choice(list(under_way.values())))
        elif under_way and rng.random() < 0.5:
            disk.source.promote(rng.choice(list(under_way.values())), rng.randrange(4))
        else:
            disk.source.wait(0.001)
        while disk.source.finished:
            load = disk.source.finished.popleft()
            ended += 1
            (slot,) = [slot for slot, other in under_way.items() if other is load]
            del under_way[slot]
            assert load.state in (LoadState.DONE, LoadState.CANCELLED)
            if load.state is LoadState.DONE:
                assert disk.holds(slot, load.key.expert)
            disk.memory[slot][:] = bytes(EXPERT + 100)  # nobody may write here now
        for slot in range(4):
            assert slot in under_way or not any(disk.memory[slot])
        disk.source.check_integrity()
    disk.end(*under_way.values())
    assert ended + len(under_way) == started


class PageDisk:
    """Experts of two pages and a bit in a file, and slots of memory that start on pages."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.nbytes = nbytes
        self.content = [random.Random(i).randbytes(nbytes) for i in range(4)]
        path = folder / "pages"
        path.write_bytes(b"".join(content.ljust(3 * PAGE, b"x") for content in self.content))
        self.memory = [mmap.mmap(-1, 3 * PAGE) for _ in self.content]

        def locate(key: ExpertKey) -> Location:
            digest = xxhash.xxh3_64_intdigest(self.content[key.expert])
            return Location(path, 3 * PAGE * key.expert, nbytes, digest)

        self.source = FileSource(
            locate, lambda layer, slot: memoryview(self.memory[slot]), piece_bytes=PAGE, direct=True
        )

    def read_all(self) -> None:
        loads = [self.source.start(ExpertKey(0, expert), expert, DEMAND) for expert in range(4)]
        deadline = time.monotonic() + 100
        while not all(load.finished for load in loads) and time.monotonic() < deadline:
            self.source.wait(0.1)
        assert [load.state for load in loads] == [LoadState.DONE] * 4
        for memory, content in zip(self.memory, self.content, strict=True):
            assert memory[: self.nbytes] == content
        assert self.source.bytes_read == 4 * self.nbytes


@pytest.mark.parametrize("nbytes", [2 * PAGE, 2 * PAGE + 100])
@pytest.mark.parametrize("refused", ["no", "when opened", "when read"])
def test_reads_past_the_page_cache_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, refused: str
) -> None:
    flag = getattr(os, "O_DIRECT", 0)
    direct: set[int] = set()
    reads: list[int] = []
    open_, preadv = os.open, os.preadv

    def opened(path: Any, flags: int, *args: Any) -> int:
        if flags & flag and refused == "when opened":
            raise OSError(errno.EINVAL, "Invalid argument")
        file = open_(path, flags & ~flag, *args)  # not every file system of a test has direct access
        direct.update([file] if flags & flag else [])
        return file

    def read(file: int, buffers: list[memoryview], offset: int) -> int:
        if file in direct:
            assert offset % PAGE == len(buffers[0]) % PAGE == 0
            if refused == "when read":
                raise OSError(errno.EINVAL, "Invalid argument")
            reads.append(offset)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)
    disk = PageDisk(tmp_path, nbytes)
    disk.read_all()
    disk.source.close()
    assert len(reads) == (8 if refused == "no" and flag else 0)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files in /proc")
def test_close_leaves_a_read_behind_that_does_not_come_back(
    make_rig: Make, read_gate: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its memory and its file live on until it does."""
    monkeypatch.setattr(transfer, "CLOSING_S", 0.2)
    rig = make_rig("disk", threads=2)
    threads = [*rig.disk._threads]
    read_gate.shut()
    rig.store.prefetch(0, [1], distance=1, budget_bytes=1 << 20)
    read_gate.wait_for(1)
    (job,) = rig.disk._jobs.values()
    rig.store.close()
    (record,) = caplog.records
    assert re.match(
        r"expert 1 of MoE layer 0 in .* is still being read 0 s after the model", record.getMessage()
    )
    assert open_files(rig.path) == 1
    rig.store.close()
    read_gate.open()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    assert open_files(rig.path) == 0
    assert bytes(job.buffer[:3000]) == rig.content[job.load.key][:3000]


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_a_timeout_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MOE_LOCAL_DISK_TIMEOUT", text)
    with pytest.raises(OptionError, match=f"DISK_TIMEOUT={text} is not a number of seconds above 0"):
        Patience()
    monkeypatch.setenv("MOE_LOCAL_DISK_TIMEOUT", "2.5")
    assert Patience().seconds == 2.5
    monkeypatch.setenv("MOE_LOCAL_DISK_TIMEOUT", "")
    assert Patience().seconds == PATIENCE_S
