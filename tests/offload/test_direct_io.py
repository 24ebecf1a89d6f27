"""The right bytes from and to anywhere: with direct access, without it, and where it is refused."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from moe_local.offload import direct_io
from moe_local.offload.direct_io import (
    PAGE,
    PageArena,
    Range,
    ReadError,
    open_for_writing,
    page_memory,
    read_ranges,
    write_fully,
)

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
        monkeypatch.setattr(direct_io, "_DIRECT", 0)
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


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, direct_io.PIECE + 1])
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
