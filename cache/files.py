"""Small files: atomic writes, locks between processes, and parsing of JSON that may be damaged."""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def parse_json(text: bytes | str, **options: Any) -> Any:
    """The same as json.loads, but every error is a ValueError, also for too deep nesting or large numbers."""
    try:
        return json.loads(text, **options)
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def write_atomically(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write `lines` (each with its newline) as UTF-8 to a temporary file, sync it, and rename it to `path`.

    Any failure, also an exception from `lines` itself, leaves only the old file. A temporary file that a
    killed writer left beside it is removed by the next write. Raises OSError.
    """
    write_bytes_atomically(path, (line.encode() for line in lines))


def write_bytes_atomically(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    """The same as `write_atomically`, for bytes."""
    target = Path(path)
    _remove_leftovers(target)
    temporary, file = _begin(target)
    try:
        with file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # still locked, so that no other writer takes it for a leftover
                os.replace(temporary, target)
        if fcntl is None:  # Windows cannot rename an open file
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _begin(target: Path) -> tuple[Path, BufferedWriter]:
    """Create a temporary file beside the target, open and locked; the lock shows that it is no leftover."""
    while True:
        # Not tempfile: only the owner may read its files, while a result should have the usual permissions.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        file = open(temporary, "xb")  # noqa: SIM115 - returned to the caller
        try:
            with suppress(OSError):  # a file system without locks, on which no leftovers are removed, either
                _lock(file.fileno(), wait=True)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        if temporary.exists():
            return temporary, file
        file.close()  # another writer removed it before it was locked


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def file_bytes(path: Path) -> int:
    """Size of a file; 0 if there is none, such as one of a listing that another process has renamed since."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def sync_folder(folder: Path) -> None:
    """Sync renames and removals in `folder` to disk. Windows cannot open folders and does not need this."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def lock_file(path: Path) -> Path:
    """The file whose lock stands for a lock on `path`."""
    return path.with_name(path.name + ".lock")


@contextmanager
def locked(
    path: Path, *, timeout_s: float | None = None, waiting: Callable[[], object] | None = None
) -> Iterator[None]:
    """Exclude all other processes and threads that lock the same `path`, which need not exist.

    If another holds the lock, calls `waiting` once and waits. Raises TimeoutError after `timeout_s`, and
    OSError where the folder of `path` is missing or read-only. On a file system without locks it proceeds
    without one.

    All stored data is locked in this way, by a lock of the operating system on an empty file beside `path`,
    which remains; a killed holder loses the lock. Locking the folder itself would leave no file, but neither
    Windows nor network file systems can do that, and what is locked here may be replaced or removed
    meanwhile. The exceptions are downloads, which use huggingface_hub's own locks, and files that are being
    written, which are locked themselves (`write_bytes_atomically`).
    """
    if not path.parent.is_dir():  # filelock would create it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    lock = filelock.FileLock(lock_file(path))
    try:
        try:
            # If the file cannot be created, this raises; filelock would assume that it was just removed, and
            # wait.
            os.close(os.open(lock_file(path), os.O_RDWR | os.O_CREAT, 0o666))
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if timeout_s == 0:
                raise
            if waiting is not None:
                waiting()
            lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
    except NotImplementedError:  # older versions of filelock, on a file system without locks
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


class Use:
    """Shows others until `close` that this process reads the files of a folder, which should not be removed.

    It is a shared lock of the operating system on the folder itself, which leaves no file and ends with the
    process. It does not exclude writers: readers keep the open files that a writer replaces. Where the folder
    is missing or the file system cannot lock folders, others see nothing; Windows removes no open file
    anyway.
    """

    def __init__(self, folder: Path) -> None:
        self._file = _lock_folder(folder, shared=True)

    def close(self) -> None:
        """Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def in_use(folder: Path) -> bool:
    """Whether a `Use` of the folder is open, in this process or another."""
    try:
        file = _lock_folder(folder, shared=False)
    except BlockingIOError:
        return True
    if file is not None:
        os.close(file)
    return False


def _lock_folder(folder: Path, *, shared: bool) -> int | None:
    """Open and lock the folder; None where that is impossible.

    An exclusive lock raises BlockingIOError while others hold one.
    """
    if fcntl is None:
        return None
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError) and not shared:
            raise
        return None  # or another process is about to remove it, which reading will notice
    return file


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files that killed writers of this file left; a live writer holds a lock on its own."""
    if fcntl is None:
        return
    for found in target.parent.glob(f".{glob.escape(target.name)}." + 8 * "[0-9a-f]"):
        with suppress(OSError):  # another process is writing it, or has removed it
            file = os.open(found, os.O_RDWR)  # network file systems require write access for a lock
            try:
                _lock(file)
                os.unlink(found)
            finally:
                os.close(file)


def _lock(file: int, wait: bool = False) -> None:
    """Lock an open file for as long as it is open. Without `wait`, raises OSError if it is locked."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
