"""The safetensors files of a checkpoint: where each tensor is, and how to read some without the others."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import xxhash

from moe_local.cache.errors import CheckpointError
from moe_local.cache.files import parse_json
from moe_local.cache.keys import format_bytes
from moe_local.offload.checkpoint.files import INDEX, SINGLE, file_inside, first_pickle, read_index
from moe_local.offload.system.direct_io import Memory, Range, ReadError, page_memory, read_ranges
from moe_local.offload.system.hung import HungError, patiently
from moe_local.offload.system.pages import PAGE

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""

MAX_DIMENSIONS = 16
"""Of a tensor; torch itself hardly has a use for eight."""

SAMPLES = 64
SAMPLE_BYTES = 4096

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a shard. `dtype` is safetensors' name; `start` counts from the file's first byte."""

    key: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {self.key} in {self.shard} has dtype {self.dtype}, which torch cannot hold"
            )
        return DTYPES[self.dtype]

    def at(self, row: int) -> StoredTensor:
        """Row `row` of this tensor [E, ...], as a tensor [1, ...]."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=(1, *self.shape[1:]), start=self.start + row * nbytes, nbytes=nbytes)


class Shards:
    """Every tensor of a checkpoint folder, by key.

    `open` reads each shard's header and checks it against the file. `read` opens the shards that it needs,
    copies the bytes into memory and closes them. So any number of threads may read, no file stays mapped, and
    memory holds only tensors that the caller keeps.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Mapping[str, int],
        tensors: Mapping[str, StoredTensor],
        remedy: str,
        headers: Mapping[str, int] | None = None,
    ):
        self.folder = folder
        self.sizes = dict(sizes)
        """Bytes of each shard."""
        self.tensors = dict(tensors)
        self.remedy = remedy
        """What to do about damaged files; ends the error messages about them."""
        self._headers = dict(headers or {})
        """Bytes of each shard's header, for shards that are not safetensors files."""

    @classmethod
    def open(cls, folder: Path, remedy: str) -> Shards:
        """Read all headers in `folder`. `remedy` ends error messages about damaged files.

        Raises CheckpointError for a folder with pickled weights only, missing or truncated shards and corrupt
        headers.
        """
        weight_map = _weight_map(folder, remedy)
        names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        missing = [name for name in names if not file_inside(folder, name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{folder}: shard {missing[0]}{more} of {len(names)} named by {INDEX} missing; {remedy}"
            )
        sizes, tensors = {}, {}
        for name in names:
            sizes[name] = (folder / name).stat().st_size
            for tensor in read_header(folder / name, remedy):
                if not weight_map or weight_map.get(tensor.key) == name:
                    tensors[tensor.key] = tensor
        return cls(folder, sizes, tensors, remedy)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return sum(self.sizes.values())

    def read(
        self, groups: Sequence[Sequence[StoredTensor]], memory: Memory = page_memory
    ) -> list[list[torch.Tensor]]:
        """The tensors of each group, one behind the other in one block of `memory` per group.

        Each is padded to a multiple of eight bytes. Blocks on the disk, and is as fast as the disk if asked
        for much at once. Raises CheckpointError when a file has changed or cannot be read, and when its disk
        does not answer.
        """
        ranges: list[Range] = []
        tensors = [self._place(group, memory, ranges) for group in groups]
        self._read(ranges)
        return tensors

    def _read(self, ranges: Sequence[Range]) -> None:
        try:
            read_ranges(ranges)
        except ReadError as error:
            raise CheckpointError(f"{error.path} cannot be read ({error}); {self.remedy}") from error
        except HungError as error:
            raise CheckpointError(f"{error.path} {error}") from error

    def _place(
        self, group: Sequence[StoredTensor], memory: Memory, ranges: list[Range]
    ) -> list[torch.Tensor]:
        """Allocate memory for the tensors of a group, and add what has to be read into it to `ranges`.

        The first tensor has the same offset within a page as in its file, and so have all others of its shard
        if their sizes are whole pages. Direct reads into such memory need no copy afterwards.
        """
        sizes = [-(-tensor.nbytes // 8) * 8 for tensor in group]
        block = memory(sum(sizes) + PAGE)
        offset = (group[0].start - block.data_ptr()) % PAGE
        if group[0].start % 8:
            offset = 0  # a view as another dtype must be aligned
        tensors = []
        for tensor, size in zip(group, sizes, strict=True):
            raw = block[offset : offset + tensor.nbytes]
            ranges.append(Range(self.folder / tensor.shard, tensor.start, raw))
            tensors.append(raw.view(tensor.torch_dtype).reshape(tensor.shape))
            offset += size
        return tensors

    def digest(self) -> str:
        """A hash of the contents: equal for copies, different for other weights of the same shapes.

        Covers each shard's name, size, header, and strided samples of its data (all of it below 256 KiB),
        which any training changes; a deliberate edit of a few weights may go unnoticed.
        """
        digest = xxhash.xxh3_128()
        names = sorted(self.sizes)
        lengths = [torch.zeros(8, dtype=torch.uint8) for _ in names]
        self._read([Range(self.folder / name, 0, out) for name, out in zip(names, lengths, strict=True)])
        for name, length in zip(names, lengths, strict=True):
            size = self.sizes[name]
            digest.update(f"{name}\n{size}\n".encode())
            header = self._headers.get(name) or 8 + int.from_bytes(length.numpy().tobytes(), "little")
            samples = [
                Range(self.folder / name, start, torch.empty(stop - start, dtype=torch.uint8))
                for start, stop in _sampled_ranges(header, size)
            ]
            self._read(samples)
            for sample in samples:
                digest.update(sample.out.numpy().data)
        return digest.hexdigest()

    def check_integrity(self) -> None:
        """Raise CheckpointError if a shard has vanished or changed its size since it was opened."""
        for name, size in self.sizes.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                now = "is gone" if found is None else f"has {found}"
                raise CheckpointError(f"{path} had {size} bytes when opened and now {now}; {self.remedy}")


def read_header(path: Path, remedy: str = "get the file again") -> Iterator[StoredTensor]:
    """The tensors of one safetensors file, checked against the file's size. Raises CheckpointError.

    Format: 8 bytes little-endian length, that many bytes of JSON, then the data, which the tensors' offsets
    must tile without gaps (https://github.com/huggingface/safetensors#format).
    """
    try:
        size, length, raw = patiently(path, lambda: _raw_header(path))
    except HungError as error:
        raise CheckpointError(f"{path} {error}") from error
    if size < 8 or (length <= MAX_HEADER and size < 8 + length):
        raise CheckpointError(f"{path} is cut short at {size} bytes, inside its header; {remedy}")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path} has a corrupt header (of {length} bytes, it says); {remedy}")
    try:
        header = parse_json(raw)
        tensors = [
            _stored(key, path.name, 8 + length, e) for key, e in header.items() if key != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a corrupt header ({type(error).__name__}); {remedy}") from error
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path} has a corrupt header (tensor {tensor.key} is out of place); {remedy}"
            )
        end += tensor.nbytes
    if size < end:
        gap = format_bytes(end - size)
        raise CheckpointError(f"{path} is cut short: {size} bytes of {end} ({gap} missing); {remedy}")
    if size > end:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor; {remedy}")
    return iter(tensors)


def _raw_header(path: Path) -> tuple[int, int, bytes]:
    """(file's size, length of the header as the file states it, header, or b"" for an impossible length)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        return size, length, file.read(length) if length <= min(size, MAX_HEADER) else b""


def _stored(key: str, shard: str, data_start: int, entry: Mapping[str, object]) -> StoredTensor:
    begin, end = _sizes(entry["data_offsets"])
    shape = _sizes(entry["shape"])
    tensor = StoredTensor(key, shard, str(entry["dtype"]), shape, data_start + begin, end - begin)
    if begin > end:
        raise ValueError(f"{key} ends before it begins")
    if tensor.dtype in DTYPES and tensor.nbytes != math.prod(shape) * DTYPES[tensor.dtype].itemsize:
        raise ValueError(f"{key}: {tensor.nbytes} bytes for shape {shape} of {tensor.dtype}")
    return tensor


def _sizes(found: object) -> tuple[int, ...]:
    """A shape or byte offsets from a header, checked. Raises ValueError or TypeError for anything else."""
    sizes = tuple(cast("list[int]", found))
    if len(sizes) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise ValueError(f"{str(found)[:80]} are no sizes")
    return sizes


def _weight_map(folder: Path, remedy: str) -> dict[str, str]:
    """Key -> shard from the index; empty if there is a single file, which transformers tries first, too."""
    if (folder / SINGLE).is_file():
        return {}
    if (folder / INDEX).is_file():
        return read_index(folder / INDEX, remedy)
    pickle = first_pickle([path.name for path in folder.iterdir()])
    if pickle is None:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; {remedy}")
    raise CheckpointError(
        f"{folder} has only pickled weights ({pickle}), which can run code when read; "
        "use a safetensors copy of the model"
    )


def _sampled_ranges(header: int, size: int) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, stop): the header, then SAMPLES blocks spread over the data, its ends included."""
    yield 0, header
    if size - header <= SAMPLES * SAMPLE_BYTES:
        yield header, size
        return
    last = size - SAMPLE_BYTES
    for i in range(SAMPLES):
        start = header + (last - header) * i // (SAMPLES - 1)
        yield start, start + SAMPLE_BYTES
