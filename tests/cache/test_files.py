from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_local.cache import files
from moe_local.cache.files import Use, file_bytes, in_use, locked, write_atomically, write_bytes_atomically


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


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path: Path) -> None:
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
    assert not left.exists()

    def lines() -> Iterator[str]:
        yield "outer"
        assert len(list(tmp_path.iterdir())) == 3
        write_atomically(target, ["inner"])
        assert len(list(tmp_path.iterdir())) == 3, "a living writer's file was removed"

    write_atomically(target, lines())
    assert target.read_text() == "outer"
    assert set(tmp_path.iterdir()) == {target, other}


@pytest.mark.parametrize("moment", ["before it is locked", "before it is renamed"])
def test_a_writer_that_was_held_up_is_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another writes the same file meanwhile; the later one wins, and neither fails."""
    target, met = tmp_path / "usage.json", []
    module, name = (files, "_lock") if moment == "before it is locked" else (os, "replace")
    real = getattr(module, name)

    def held_up(*args: object, **options: object) -> object:
        if not met and (name == "replace" or options.get("wait")):
            met.append(True)
            write_atomically(target, ["other"])
        return real(*args, **options)

    monkeypatch.setattr(module, name, held_up)
    write_atomically(target, ["held up"])
    assert met
    assert target.read_text() == "held up"
    assert list(tmp_path.iterdir()) == [target]


def test_one_at_a_time(tmp_path: Path) -> None:
    """Also for what is not there; who waits is told once, or gives up."""
    path, told = tmp_path / "a", []
    with locked(path):
        assert not path.exists()
        with pytest.raises(TimeoutError), locked(path, timeout_s=0, waiting=lambda: told.append("no")):
            pass
        with pytest.raises(TimeoutError), locked(path, timeout_s=0.1, waiting=lambda: told.append("yes")):
            pass
        with locked(tmp_path / "b"):
            pass
    with locked(path, timeout_s=0):
        pass
    assert told == ["yes"]
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nowhere" / "a"):
        pass


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder like this")
def test_where_no_file_can_be_made_nobody_waits() -> None:
    """In such a folder the system says that the file is missing, which is no reason to try again."""
    with pytest.raises(FileNotFoundError), locked(Path("/proc/self/a"), timeout_s=1):
        pass


def test_a_killed_holder_gives_its_lock_back(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path / "a"):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(TimeoutError), locked(tmp_path / "a", timeout_s=0):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path / "a", timeout_s=0):
        pass


@pytest.mark.parametrize("refusal", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise refusal

    monkeypatch.setattr(files.filelock.FileLock, "acquire", refuse)
    with locked(tmp_path / "a"):
        pass
    with pytest.raises(KeyError), locked(tmp_path / "a"):
        raise KeyError


def test_a_folder_is_in_use_while_any_reader_is_there(tmp_path: Path) -> None:
    """Killed ones are not; nothing is left in the folder, nor is one that is missing anybody's."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        use = Use(tmp_path)
        os.write(writing, b"!")
        signal.pause()
        use.close()
    os.read(reading, 1)
    first = Use(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert in_use(tmp_path)
    second = Use(tmp_path)
    first.close()
    first.close()
    assert in_use(tmp_path)
    second.close()
    assert not in_use(tmp_path)
    assert not list(tmp_path.iterdir())
    missing = Use(tmp_path / "missing")
    assert not in_use(tmp_path / "missing")
    missing.close()


def test_what_cannot_be_locked_is_not_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, what: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr("moe_local.cache.files.fcntl.flock", refuse)
    Use(tmp_path).close()
    assert not in_use(tmp_path)
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_that_is_gone_since_it_was_listed_has_no_bytes(tmp_path: Path) -> None:
    kept, renamed = tmp_path / "kept", tmp_path / "renamed"
    kept.write_bytes(b"four")
    renamed.write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    listing = [*tmp_path.iterdir()]
    renamed.unlink()
    assert sum(map(file_bytes, listing)) == 4
    assert file_bytes(kept / "below a file") == 0
