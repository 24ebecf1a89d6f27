"""The right bytes from and to anywhere: with direct access, without it, and where it is refused."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from moe_local.offload.system import direct_io, hung, pages
from moe_local.offload.system.direct_io import PageArena, Range, ReadError, page_memory, read_ranges
from moe_local.offload.system.hung import HungError
from moe_local.offload.system.pages import PAGE, open_for_writing, write_fully
from moe_local.offload.system.patience import PATIENCE_S, Patience

needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no direct access")


@pytest.fixture(params=["direct", "refused when opened", "refused when used", "unknown to the system"])
def access(request, monkeypatch):
    """Every way that a system deals with direct access, with pieces small enough to have many of them."""
    real_open, real_read, real_write = os.open, os.preadv, os.write
    refusal = OSError(errno.EINVAL, "Invalid argument")
    asked = []

    def opens(path, flags, *rest):
        if flags & getattr(os, "O_DIRECT", 0):
            asked.append(path)
            if request.param == "refused when opened":
                raise refusal
        return real_open(path, flags, *rest)

    def reads(file, buffers, offset):
        if request.param == "refused when used":
            raise refusal
        return real_read(file, buffers, offset)

    def writes(file, data):
        import fcntl

        if request.param == "refused when used" and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise refusal
        return real_write(file, data)

    if request.param == "unknown to the system":
        monkeypatch.setattr(pages, "_DIRECT", 0)
        monkeypatch.setattr(direct_io, "open_directly", lambda path: None)
    monkeypatch.setattr(direct_io, "PIECE", 3 * PAGE)
    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "preadv", reads)
    monkeypatch.setattr(os, "write", writes)
    yield request.param
    assert bool(asked) == (request.param != "unknown to the system" and hasattr(os, "O_DIRECT"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of random bytes, one of whole pages and one not."""
    paths = []
    for name, size in (("whole", 40 * PAGE), ("odd", 100_001)):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(random.Random(size).randbytes(size))
    return paths


def test_any_ranges_of_any_files(files, access):
    draw = random.Random(0)
    contents = [path.read_bytes() for path in files]
    for _ in range(50):
        ranges, expected = [], []
        for _ in range(draw.randint(1, 6)):
            number = draw.randrange(2)
            size = len(contents[number])
            start = draw.choice([0, draw.randrange(size), draw.randrange(size) // PAGE * PAGE])
            stop = draw.choice([size, draw.randint(start, size), min(size, start + 5 * PAGE)])
            ranges.append(Range(files[number], start, torch.zeros(stop - start + 1, dtype=torch.uint8)[1:]))
            expected.append(contents[number][start:stop])
        ranges.append(Range(files[0], 7, torch.zeros(9 * PAGE, dtype=torch.uint8)))  # more than one piece
        expected.append(contents[0][7 : 7 + 9 * PAGE])
        read_ranges(ranges)
        assert [found.out.numpy().tobytes() for found in ranges] == expected


def test_little_is_read_ordinarily(files, monkeypatch):
    monkeypatch.setattr(os, "preadv", None)
    out = torch.zeros(1000, dtype=torch.uint8)
    read_ranges([Range(files[1], 99_001, out), Range(files[1], 5, out[:0])])
    assert out.numpy().tobytes() == files[1].read_bytes()[99_001:]


@pytest.mark.parametrize("size", [100, 10 * PAGE])
def test_a_file_that_ends_too_early(files, access, size):
    out = torch.zeros(size, dtype=torch.uint8)
    big = torch.zeros(10 * PAGE, dtype=torch.uint8)
    with pytest.raises(ReadError, match="it ends at byte 100001") as caught:
        read_ranges([Range(files[0], 0, big), Range(files[1], 100_001 - size // 2, out)])
    assert caught.value.path == files[1]


def test_a_file_that_is_not_there(files, tmp_path, access):
    out = torch.zeros(10 * PAGE, dtype=torch.uint8)
    with pytest.raises(ReadError, match="No such file") as caught:
        read_ranges([Range(files[0], 0, out), Range(tmp_path / "absent", 0, out.clone())])
    assert caught.value.path == tmp_path / "absent"


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, pages.HUGE + 1])
def test_page_memory(nbytes):
    memory = page_memory(nbytes)
    assert memory.shape == (nbytes,)
    assert memory.data_ptr() % PAGE == 0
    memory.fill_(7)
    assert page_memory(nbytes).fill_(8).eq(8).all()
    assert memory.eq(7).all()


def test_an_arena_gives_the_same_blocks_again():
    arena = PageArena()
    first = [arena(nbytes) for nbytes in (100, 5000)]
    assert first[0].data_ptr() != first[1].data_ptr()
    arena.reset()
    again = [arena(nbytes) for nbytes in (50, 9000, 10)]
    assert [block.numel() for block in again] == [50, 9000, 10]
    assert again[0].data_ptr() == first[0].data_ptr()
    assert len({block.data_ptr() for block in again} | {first[1].data_ptr()}) == 4


@pytest.mark.parametrize("short", [False, True])
def test_writing(tmp_path, access, short, monkeypatch):
    """Whole pages on pages, then neither, then both again; with every write cut short as well."""
    if short:
        real = os.write
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: max(1, len(data) // 2)]))
    memory = page_memory(5 * PAGE)
    memory.copy_(torch.frombuffer(bytearray(random.Random(1).randbytes(5 * PAGE)), dtype=torch.uint8))
    parts = [memory, memory[1 : 1 + PAGE], memory[:100], memory[: 2 * PAGE]]
    file = open_for_writing(tmp_path / "new")
    for part in parts:
        write_fully(file, part.numpy().data)
    write_fully(file, memoryview(b"read only"))
    write_fully(file, memoryview(b""))
    os.close(file)
    expected = b"".join(part.numpy().tobytes() for part in parts) + b"read only"
    assert (tmp_path / "new").read_bytes() == expected


def test_errors_of_writing_are_raised(tmp_path, access, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    file = open_for_writing(tmp_path / "new")
    with pytest.raises(OSError, match="No space left"):
        write_fully(file, page_memory(PAGE).numpy().data)
    os.close(file)
    with pytest.raises(FileNotFoundError):
        open_for_writing(tmp_path / "absent" / "new")


@needs_direct
def test_aligned_writes_stay_direct(tmp_path):
    import fcntl

    file = open_for_writing(tmp_path / "new")
    if not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
        pytest.skip("this file system has no direct access")
    write_fully(file, page_memory(3 * PAGE).numpy().data)
    assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
    write_fully(file, page_memory(3 * PAGE)[1:].numpy().data)
    assert not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
    os.close(file)


# --- a disk that does not answer


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


@pytest.fixture
def pipe(tmp_path: Path, impatient: set[Path]) -> Iterator[Path]:
    """A file that nothing comes from, as from a share whose server is gone; in the end something does."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    impatient.add(path)
    yield path
    while reading_threads():
        with suppress(OSError):  # nobody opens it at this moment
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.01)


@pytest.mark.parametrize("size", [100, 10 * PAGE])
def test_what_hangs_is_named_and_left_behind(files, pipe, monkeypatch, size):
    monkeypatch.setattr(direct_io, "PIECE", 3 * PAGE)
    outs = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    began = time.monotonic()
    with pytest.raises(
        HungError, match=r"^is being read, and its disk has given nothing for 0 s; check"
    ) as caught:
        read_ranges([Range(files[0], 0, outs[0]), Range(pipe, 0, outs[1])])
    assert 0.25 < time.monotonic() - began < PATIENCE_S
    assert caught.value.path == pipe
    assert outs[0].numpy().tobytes() == files[0].read_bytes()[:size]
    assert all(thread.daemon for thread in reading_threads())
    read_ranges([Range(files[1], 0, outs[1])])  # others are served
    assert outs[1].numpy().tobytes() == files[1].read_bytes()[:size]


def test_what_is_slow_is_not_given_up(files, monkeypatch):
    """However often is waited in all: whatever comes makes patience begin anew."""
    piece, waits = threading.Semaphore(0), 0

    class Counted(Patience):
        def wait(self, changed, seconds):
            nonlocal waits
            waits += 1
            self._waited += 1.0
            if waits % 2 == 0:
                piece.release()
                assert changed.wait(100)

    def slow(found):
        piece.acquire()
        real(found)

    real = direct_io._read
    monkeypatch.setattr(hung, "Patience", Counted)
    monkeypatch.setenv("MOE_LOCAL_DISK_TIMEOUT", "2.5")
    monkeypatch.setattr(direct_io, "_read", slow)
    outs = [torch.zeros(PAGE, dtype=torch.uint8) for _ in range(4)]
    read_ranges([Range(files[0], PAGE * number, out) for number, out in enumerate(outs)])
    assert b"".join(out.numpy().tobytes() for out in outs) == files[0].read_bytes()[: 4 * PAGE]
    assert waits == 8
    assert not reading_threads()


def test_ctrl_c_waits_for_what_is_under_way(files, monkeypatch):
    """Its memory is the caller's again after it; what was not begun is not."""
    read, given_up, ended = [], threading.Event(), threading.Event()
    give_up = hung._Crew._give_up

    def slow(found):
        read.append(found.start)
        if len(read) == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert given_up.wait(100)
        time.sleep(0.2)
        ended.set()

    monkeypatch.setattr(hung._Crew, "_give_up", lambda crew: (give_up(crew), given_up.set()))
    monkeypatch.setattr(direct_io, "_read", slow)
    out = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(KeyboardInterrupt):
        read_ranges([Range(files[0], start, out) for start in range(5)])
    assert ended.is_set()
    assert read == [0]


def test_the_first_error_ends_the_others(files, monkeypatch):
    read = []

    def fails(found):
        read.append(found.start)
        raise MemoryError

    monkeypatch.setattr(direct_io, "_read", fails)
    out = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(MemoryError):
        read_ranges([Range(files[0], start, out) for start in range(5)])
    assert read == [0]
    assert not reading_threads()
