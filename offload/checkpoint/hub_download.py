"""Downloads large files from the Hub into its cache, and resumes where an interrupted download stopped.

huggingface_hub 2 discards an unfinished file, which for a shard of 5 GB costs many people an hour. So this
module downloads the weights itself, by byte ranges, into <cache>/models--org--name/blobs/<hash>.incomplete,
then renames that to blobs/<hash>, where huggingface_hub finds it and links it into the snapshot as usual.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from moe_local.cache.errors import CheckpointError, DoesNotFitError
from moe_local.cache.files import file_bytes, nearest_folder
from moe_local.cache.keys import format_bytes

WORKERS = 4
"""Files fetched at once."""

RETRIES = 6
"""Retries in a row that receive no byte before a download fails, half a minute after the first failure."""

PIECE = 2**20
"""Bytes of an unfinished file that are read and hashed at once."""

MARGIN_BYTES = 512 * 2**20
"""Disk space that a download leaves free."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a Hub repository. `sha256` is None for small files, which git itself stores as `blob_id`."""

    name: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def blob(self) -> str:
        """The file's name in the cache's folder of blobs."""
        return self.sha256 or self.blob_id


def blobs_folder(repo_id: str) -> Path:
    """Where the Hub cache keeps the contents of `repo_id`'s files."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder: str = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "blobs"


def begun(repo_id: str) -> bool:
    """Whether the cache has weights of `repo_id`, even a part of one file; sha256 hashes name their blobs."""
    return any(blobs_folder(repo_id).glob(64 * "?" + "*"))


def missing_bytes(repo_id: str, files: Sequence[HubFile]) -> int:
    """Bytes of `files` that the Hub cache does not have yet."""
    folder = blobs_folder(repo_id)
    return sum(file.size - _have(folder, file) for file in files)


def require_space(name: str, repo_id: str, files: Sequence[HubFile]) -> None:
    """Raise DoesNotFitError if the Hub cache's disk has no room for the missing bytes of `files`."""
    need = missing_bytes(repo_id, files)
    folder = blobs_folder(repo_id)
    free = shutil.disk_usage(nearest_folder(folder)).free
    if need and need + MARGIN_BYTES > free:
        raise DoesNotFitError(
            f"{name} needs {format_bytes(need + MARGIN_BYTES)} of disk in {folder.parent.parent}, where "
            f"{format_bytes(free)} are free; make room or set HF_HUB_CACHE to a folder on a larger disk"
        )


def download_blobs(repo_id: str, commit: str, files: Sequence[HubFile], progress: bool) -> None:
    """Download `files` at `commit` into the Hub cache, several at a time, with one progress bar for all.

    Skips files that are already there. Blocks. Received bytes are kept when it fails or is interrupted.
    Raises DoesNotFitError (disk full), CheckpointError (wrong contents) or the Hub library's HTTP errors.
    """
    from huggingface_hub import constants

    folder = blobs_folder(repo_id)
    folder.mkdir(parents=True, exist_ok=True)
    # The Hub serves larger files by its own protocol only; they are left to huggingface_hub.
    files = [file for file in files if file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE]
    todo = [file for file in files if not (folder / file.blob).exists()]
    stop = threading.Event()
    with _bar(repo_id, sum(file.size for file in todo), progress) as advance:
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="moe-local-pull") as pool:
            jobs = [pool.submit(_fetch, repo_id, commit, file, folder, advance, stop) for file in todo]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            finally:
                # Also on Ctrl-C: running downloads end at their next block, waiting ones never start.
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        for job in done:
            job.result()
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """Delete unfinished files that no process is writing: of an earlier revision, or huggingface_hub's."""
    for part in folder.glob("*.incomplete"):
        lock = FileLock(_lock_path(folder, part.name.partition(".")[0]))
        with suppress(Timeout, OSError), lock.acquire(timeout=0):
            part.unlink()


def network_error() -> type[Exception]:
    """The base class of errors of huggingface_hub's HTTP library, whose package has a new name since 2.0."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


class _Stopped(Exception):
    """Another download failed or the user interrupted."""


class _Sink(io.FileIO):
    """The unfinished file, opened at its end. Moves the progress bar; raises _Stopped once `stop` is set.

    Hashes the bytes that the file already has and those that are appended, faster than any connection.
    """

    def __init__(self, path: Path, advance: Callable[[int], None], stop: threading.Event) -> None:
        super().__init__(path, "r+b" if path.exists() else "w+b")
        self._advance = advance
        self._stop = stop
        self._hash = hashlib.sha256()
        while block := self.read(PIECE):
            if stop.is_set():
                self.close()
                raise _Stopped
            self._hash.update(block)
            advance(len(block))

    @property
    def sha256(self) -> str:
        """The hash of the whole file so far."""
        return self._hash.hexdigest()

    def append(self, block: bytes) -> None:
        if self._stop.is_set():
            raise _Stopped
        view = memoryview(block)
        while view:
            view = view[self.write(view) :]
        self._hash.update(block)
        self._advance(len(block))

    def restart(self) -> None:
        self._advance(-self.tell())
        self.seek(0)
        self.truncate()
        self._hash = hashlib.sha256()

    def pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped


def _fetch(
    repo_id: str,
    commit: str,
    file: HubFile,
    folder: Path,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Download one file from where the last attempt stopped."""
    target, partial = folder / file.blob, folder / f"{file.blob}.incomplete"
    if stop.is_set():
        return
    with FileLock(_lock_path(folder, file.blob)):
        if target.exists():
            advance(file.size)
            return
        try:
            with _Sink(partial, advance, stop) as sink:
                _get(repo_id, commit, file, sink)
                os.fsync(sink.fileno())
                found = sink.sha256
        except _Stopped:
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DoesNotFitError(
                f"the disk is full at {file.name} in {folder}; make room and run again, it continues"
            ) from error
        if file.sha256 not in (None, found):
            partial.unlink()
            raise CheckpointError(
                f"{file.name} arrived damaged (its sha256 differs); run again to fetch it anew"
            )
        partial.replace(target)


def _get(repo_id: str, commit: str, file: HubFile, sink: _Sink) -> None:
    """Append the missing bytes to `sink`; after a broken connection, continue where it broke."""
    failures = 0
    while sink.tell() != file.size:
        have, problem = sink.tell(), None
        try:
            _append_rest(repo_id, commit, file, sink)
        except network_error() as error:
            problem = error
        if sink.tell() == file.size:
            return
        failures = 0 if sink.tell() > have else failures + 1
        if failures > RETRIES or (problem is not None and _is_final(problem)):
            raise problem or CheckpointError(
                f"the Hub sends {sink.tell()} of {file.size} bytes of {file.name}"
            )
        sink.pause(2.0**failures / 4)


def _is_final(error: Exception) -> bool:
    """Whether the Hub refused the request, rather than being busy or out of reach."""
    from huggingface_hub.errors import HfHubHTTPError

    return (
        isinstance(error, HfHubHTTPError)
        and error.response.status_code in range(400, 500)
        and (error.response.status_code not in (408, 429))
    )


def _append_rest(repo_id: str, commit: str, file: HubFile, sink: _Sink) -> None:
    """Request all bytes that `sink` lacks, once, and append what arrives."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    if sink.tell() > file.size:
        sink.restart()
    have = sink.tell()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    url = hf_hub_url(repo_id, file.name, revision=commit)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream(
        "GET", url, headers=headers, timeout=timeout, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        if have and response.status_code != 206:
            sink.restart()
        for block in response.iter_bytes():
            sink.append(block)


def _lock_path(folder: Path, blob: str) -> Path:
    """The lock file that huggingface_hub itself uses for this blob."""
    locks = folder.parent.parent / ".locks" / folder.parent.name
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{blob}.lock"


def _have(folder: Path, file: HubFile) -> int:
    if (folder / file.blob).exists():
        return file.size
    return min(file.size, file_bytes(folder / f"{file.blob}.incomplete"))


@contextmanager
def _bar(label: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    """Show one bar over all bytes; yields a function, callable from any thread, that advances it."""
    if not visible:  # rather than a disabled bar, at whose end rich before 14.3 prints an empty line
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)]
    columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.update(task, advance=count)
