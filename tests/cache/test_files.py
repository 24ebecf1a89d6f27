from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_local.cache import files
from moe_local.cache.files import write_atomically, write_bytes_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    write_atomically(target, ["one\n", "zwölf\n"])
    assert target.read_bytes() == "one\nzwölf\n".encode()
    write_atomically(target, ["two\n"])
    assert target.read_text() == "two\n"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_failure_half_way_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old\n")

    def lines() -> Iterator[str]:
        yield "new\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, lines())
    assert target.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["result.json"]


def test_is_as_readable_as_any_other_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    write_atomically(tmp_path / "atomic", [])
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "result.json", [])


def test_bytes_that_fail_half_way_leave_the_old_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    target = tmp_path / "picture"
    write_bytes_atomically(target, [b"\x00\r\n", b"\xff"])
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomically(target, pieces())
    assert target.read_bytes() == b"\x00\r\n\xff"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_writer_left_goes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not what a living one is writing, nor what belongs to another file."""
    target, other = tmp_path / "usage.json", tmp_path / ".usage.json2.0123abcd"
    other.write_text("another's")

    def die() -> Iterator[str]:
        yield "half of"
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        write_atomically(target, die())
    os.waitpid(pid, 0)
    (left,) = set(tmp_path.iterdir()) - {other}
    write_atomically(target, ["whole"])
    assert left.exists(), "its writer may have just begun"
    monkeypatch.setattr(files, "FRESH_S", -1.0)

    def lines() -> Iterator[str]:
        yield "outer"
        assert not left.exists()
        assert len(list(tmp_path.iterdir())) == 3
        write_atomically(target, ["inner"])
        assert len(list(tmp_path.iterdir())) == 3, "a living writer's file was removed"

    write_atomically(target, lines())
    assert target.read_text() == "outer"
    assert set(tmp_path.iterdir()) == {target, other}
