"""One shard of an expert file: the experts of one MoE layer in one safetensors file.

Each expert is one flat U8 tensor of whole pages, and the data section starts on a page, so that direct
I/O can read any expert in place. The header has all that is needed to recognize a finished shard.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import xxhash

from moe_local.cache.errors import DoesNotFitError, ExpertFileError
from moe_local.cache.files import parse_json, sync_folder
from moe_local.cache.keys import format_bytes
from moe_local.offload.quantize.layout import PAGE, Layout
from moe_local.offload.system.home import moe_local_home
from moe_local.offload.system.pages import open_for_writing, page_mapping, write_fully

VERSION = 1
"""The version of the format of shards and manifest; raised when older releases could not read new files."""

TEMPORARY = ".tmp"
"""Suffix of a file that is being written."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The content of a shard, known before any weight is read; two equal plans give files of equal bytes."""

    fingerprint: str
    """The fingerprint of the checkpoint that the experts come from."""
    format: str
    """The format asked for; a single expert's is in its layout."""
    layer: int
    layer_name: str
    layouts: tuple[Layout, ...]
    """The layout of each expert, by number."""

    @property
    def file(self) -> str:
        return f"layer-{self.layer:05d}.safetensors"

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header()) + sum(layout.nbytes for layout in self.layouts)

    def offsets(self) -> tuple[int, ...]:
        """Where each expert starts in the file, multiples of 4096."""
        offsets, offset = [], len(self.header())
        for layout in self.layouts:
            offsets.append(offset)
            offset += layout.nbytes
        return tuple(offsets)

    def header(self, checksums: Sequence[int] | None = None) -> bytes:
        """The file's first bytes up to the data: safetensors' length and JSON, padded to whole pages.

        The length does not depend on `checksums` (xxh3_64 of each expert; None: zeros are written).
        """
        layouts = list(dict.fromkeys(self.layouts))
        fields: dict[str, object] = {
            "__metadata__": {
                "moe_local_version": str(VERSION),
                "fingerprint": self.fingerprint,
                "expert_format": self.format,
                "layer": str(self.layer),
                "layer_name": self.layer_name,
                "layouts": json.dumps([layout.to_dict() for layout in layouts]),
                "expert_layouts": json.dumps([layouts.index(layout) for layout in self.layouts]),
                "xxh3_64": " ".join(f"{value:016x}" for value in checksums or [0] * len(self.layouts)),
            }
        }
        start = 0
        for expert, layout in enumerate(self.layouts):
            end = start + layout.nbytes
            fields[f"expert.{expert}"] = {
                "dtype": "U8",
                "shape": [layout.nbytes],
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(fields, separators=(",", ":")).encode()
        length = -(-(8 + len(text)) // PAGE) * PAGE - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def stored_checksums(self, folder: Path) -> tuple[int, ...] | None:
        """The checksums in this shard's finished file in `folder`; None if it is absent or another shard.

        Compares the whole header and the file's size, not the experts' bytes.
        """
        path, size = folder / self.file, len(self.header())
        try:
            with open(path, "rb") as file:
                header = file.read(size)
            words = parse_json(header[8:])["__metadata__"]["xxh3_64"].split()
            checksums = tuple(int(word, 16) for word in words)
            same = self.header(checksums) == header and path.stat().st_size == self.nbytes
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return checksums if same else None


class ShardWriter:
    """Writes one shard: a context in which `add` is called for each expert in turn, then `finish` once.

    Fast if an expert's memory starts on a page boundary, since it is then written with direct I/O.

    The bytes go to a temporary file beside the shard, which takes the shard's name in `finish`, after it
    has reached the disk. Leaving the context earlier, by whatever exception, removes the temporary file.
    Raises DoesNotFitError when the disk is full, ExpertFileError when it cannot be written.
    """

    def __init__(self, plan: ShardPlan, folder: Path) -> None:
        self.plan = plan
        self.path = folder / plan.file
        self._temporary = folder / (plan.file + TEMPORARY)
        self._checksums: list[int] = []
        self._file: int | None = None

    def __enter__(self) -> ShardWriter:
        with disk_errors(self.path, self.plan.nbytes):
            self._file = open_for_writing(self._temporary)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._temporary.unlink(missing_ok=True)

    def add(self, expert: memoryview) -> None:
        """Append the next expert, as many bytes as its layout says."""
        assert self._file is not None
        assert len(expert) == self.plan.layouts[len(self._checksums)].nbytes
        with disk_errors(self.path, self.plan.nbytes):
            if not self._checksums:
                write_fully(self._file, _on_pages(self.plan.header()))
            write_fully(self._file, expert)
        self._checksums.append(xxhash.xxh3_64_intdigest(expert))

    def finish(self) -> tuple[int, ...]:
        """Make the complete shard durable, then give it its name; returns the experts' checksums."""
        assert self._file is not None
        self.check_integrity()
        with disk_errors(self.path, self.plan.nbytes):
            os.lseek(self._file, 0, os.SEEK_SET)
            write_fully(self._file, _on_pages(self.plan.header(self._checksums)))
            os.fsync(self._file)
            self._close()
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        return tuple(self._checksums)

    def check_integrity(self) -> None:
        """Raises AssertionError unless all experts, and nothing else, have been written."""
        assert self._file is not None
        assert len(self._checksums) == len(self.plan.layouts)
        assert os.fstat(self._file).st_size == self.plan.nbytes

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)


def _on_pages(data: bytes) -> memoryview:
    """A copy in page-aligned memory, for direct I/O."""
    view = memoryview(page_mapping(len(data)))
    view[:] = data
    return view


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by a file of `data`, which is on the disk before it takes the name.

    Raises as ShardWriter does.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(path, len(data)):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, nbytes: int = 0) -> Iterator[None]:
    """Turn OSError in the block, which writes `path` (of `nbytes`), into one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size = f" ({format_bytes(nbytes)})" if nbytes else ""
            raise DoesNotFitError(
                f"cannot write {path}{size}: {error.strerror}; "
                "free some disk space and run it again, finished layers are kept"
            ) from error

        remedy = "choose another folder"
        if path.is_relative_to(moe_local_home()):
            remedy = "set MOE_LOCAL_HOME to a folder that can be written to"
        raise ExpertFileError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
