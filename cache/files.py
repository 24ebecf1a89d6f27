"""Small files: written so that a reader sees the old one or the new one, whole; read whatever is in them."""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
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
    """As json.loads, but whatever is wrong raises ValueError, too deep nesting and large numbers included."""
    try:
        return json.loads(text, **options)
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def write_atomically(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write `lines` (each with its newline) as UTF-8: beside the target, to the disk, then into its place.

    Whatever goes wrong, also in `lines` themselves, leaves the old file and nothing else; what a writer that
    was killed left beside it goes with the next one. Raises OSError.
    """
    write_bytes_atomically(path, (line.encode() for line in lines))


def write_bytes_atomically(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    """As `write_atomically`, for bytes."""
    target = Path(path)
    _remove_leftovers(target)
    temporary, file = _begin(target)
    try:
        with file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is locked, or another writer could take it for a leftover
                os.replace(temporary, target)
        if fcntl is None:  # Windows renames no open file
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _begin(target: Path) -> tuple[Path, BufferedWriter]:
    """A new file beside the target, open and locked: as long as that lasts, it is no leftover."""
    while True:
        # Not tempfile: its files are for the owner alone, and a result should be as readable as any other.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        file = open(temporary, "xb")  # noqa: SIM115 - handed to whoever asked
        try:
            with suppress(OSError):  # a file system without locks: then nobody removes what is left, either
                _lock(file.fileno(), wait=True)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        if temporary.exists():
            return temporary, file
        file.close()  # removed before it was locked


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def sync_folder(folder: Path) -> None:
    """Bring renames and removals in `folder` to the disk. Windows cannot open a folder and needs none."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def lock_file(path: Path) -> Path:
    """The file that is locked in the place of `path`."""
    return path.with_name(path.name + ".lock")


@contextmanager
def locked(
    path: Path, *, timeout_s: float | None = None, waiting: Callable[[], object] | None = None
) -> Iterator[None]:
    """Exclude all other processes and threads that do the same for `path`, which need not exist.

    Waits for the others, calling `waiting` once if there are any; raises TimeoutError when that took longer
    than `timeout_s`, and OSError where its folder is missing or read-only. On a file system that knows no
    locks it goes on without.

    The one kind of lock on what is kept. It is the system's, on an empty file beside `path`, which stays: a
    killed holder gives it back. Locking the folder itself would leave no file, but Windows cannot do that,
    nor can network file systems, and what is locked here is replaced or removed meanwhile. Not of this kind
    are downloads, which take huggingface_hub's own locks, and files that are being written, which are locked
    themselves (`write_bytes_atomically`).
    """
    if not path.parent.is_dir():  # which filelock would make
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    lock = filelock.FileLock(lock_file(path))
    try:
        try:
            # Where no file can be made, filelock takes it for one that somebody has just removed, and waits.
            os.close(os.open(lock_file(path), os.O_RDWR | os.O_CREAT, 0o666))
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if timeout_s == 0:
                raise
            if waiting is not None:
                waiting()
            lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
    except NotImplementedError:  # how older versions of filelock say so
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


class Use:
    """Says until `close` that this process reads what lies in a folder, so that nobody should remove it.

    A shared lock of the system's on the folder itself, which leaves no file and ends with the process. No
    lock for those who write: what they replace, readers go on with. Where the folder is missing or the file
    system locks no folders, nobody is told; Windows removes no open file anyway.
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
    """The folder, open and locked; None where that cannot be. Raises BlockingIOError if others hinder it."""
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
        return None  # or somebody is about to remove it: reading will tell
    return file


def _remove_leftovers(target: Path) -> None:
    """What writers of this file left that were killed: a living one holds a lock on its own."""
    if fcntl is None:
        return
    for found in target.parent.glob(f".{glob.escape(target.name)}." + 8 * "[0-9a-f]"):
        with suppress(OSError):  # somebody is writing it, or another removed it
            file = os.open(found, os.O_RDWR)  # which network file systems want for a lock
            try:
                _lock(file)
                os.unlink(found)
            finally:
                os.close(file)


def _lock(file: int, wait: bool = False) -> None:
    """Lock an open file for as long as it is open. Without `wait`, raises OSError if somebody else has."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
