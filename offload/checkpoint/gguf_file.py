"""Reads the headers of GGUF files: metadata and tensors' places (github.com/ggml-org/ggml, docs/gguf.md)."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.files import GGUF_MAGIC, parts_of
from moe_local.offload.checkpoint.shards import DTYPES, Shards, StoredTensor
from moe_local.offload.checkpoint.weights import Weight
from moe_local.offload.quantize.gguf import FORMATS
from moe_local.offload.system.hung import HungError, patiently

VERSIONS = (2, 3)
TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
"""ggml's numbers of the types that are read."""
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_HEADER = 256 << 20
"""Bytes; ten times the size of the longest vocabularies."""
MAX_ARRAY = 256
"""Numbers in an array that is kept, such as one for each layer."""
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The headers of a model's file, or of its files if it is split. Holds no weights and no open files."""

    path: Path
    """The file, or the first of several."""
    metadata: dict[str, Any]
    """The first file's metadata. Of arrays, only short ones of numbers are kept, as tuples; of others, mostly
    vocabularies, the lengths."""
    weights: dict[str, Weight]
    """By their names in GGUF."""
    shards: Shards

    @classmethod
    def open(cls, path: Path, remedy: str = "get the file again") -> GgufFile:
        """Read the headers of the file at `path` and, if it is part of a split model, of all other parts.

        Raises CheckpointError for files that are not GGUF or are truncated, and for missing parts.
        """
        metadata: dict[str, Any] = {}
        weights: dict[str, Weight] = {}
        sizes, headers = {}, {}
        for number, part in enumerate(parts_of(path)):
            try:
                found, described, start = patiently(part, partial(_header, part, remedy))
            except HungError as error:
                raise CheckpointError(f"{part} {error}") from error
            metadata = metadata or found
            sizes[part.name], headers[part.name] = part.stat().st_size, start
            for weight in _weights(part.name, described, start, remedy):
                weights[weight.key] = weight
                stored = weight.parts[0]
                if stored.start + stored.nbytes > sizes[part.name]:
                    raise CheckpointError(f"{part} is cut short, inside tensor {weight.key}; {remedy}")
            path = part if number == 0 else path
        tensors = {key: weight.parts[0] for key, weight in weights.items()}
        return cls(path, metadata, weights, Shards(path.parent, sizes, tensors, remedy, headers))


class _Described(tuple[str, tuple[int, ...], int, int]):
    """(name, shape with the fastest dimension last, type, offset in the data section) of a tensor."""

    __slots__ = ()


def read_arrays(path: Path, keys: Collection[str]) -> dict[str, Sequence[Any]]:
    """The arrays `keys` of the file's metadata, whole, so far as they are there. Raises CheckpointError."""
    remedy = "get the file again"
    try:
        metadata, _, _ = patiently(path, partial(_header, path, remedy, keys))
    except HungError as error:
        raise CheckpointError(f"{path} {error}") from error
    return {key: metadata[key] for key in keys if isinstance(metadata.get(key), list | tuple)}


def _header(
    path: Path, remedy: str, whole: Collection[str] = ()
) -> tuple[dict[str, Any], list[_Described], int]:
    """(metadata, tensors, start of the data section). `whole`: fields whose arrays are kept, however long.

    Raises CheckpointError.
    """
    with open(path, "rb") as opened:
        file = _Header(opened, min(path.stat().st_size, MAX_HEADER))
        try:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                raise CheckpointError(f"{path} is no GGUF file; {remedy}")
            (version,) = _numbers(file, "I")
            if version not in VERSIONS:
                raise CheckpointError(f"{path} is GGUF version {version}, only 2 and 3 are read; {remedy}")
            tensor_count, field_count = _numbers(file, "QQ")
            metadata = {}
            for _ in range(field_count):
                key = _string(file)
                (kind,) = _numbers(file, "I")
                metadata[key] = _value(file, kind, whole=key in whole)
            tensors = []
            for _ in range(tensor_count):
                name = _string(file)
                (dimensions,) = _numbers(file, "I")
                if not 1 <= dimensions <= MAX_DIMENSIONS:
                    raise ValueError(f"{dimensions} dimensions")
                shape = _numbers(file, f"{dimensions}Q")[::-1]
                tensors.append(_Described((name, shape, *_numbers(file, "IQ"))))
            start = _aligned(file.tell(), metadata.get("general.alignment", 32))
        except (struct.error, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is cut short or corrupt inside its header; {remedy}") from error
        return metadata, tensors, start


def _weights(shard: str, tensors: list[_Described], start: int, remedy: str) -> Iterator[Weight]:
    """Raises CheckpointError for rows that are not whole blocks."""
    for name, shape, kind, offset in tensors:
        format = TYPES.get(kind, f"ggml type {kind}")
        if format in FORMATS:
            numbers, nbytes, _ = FORMATS[format]
            if shape[-1] % numbers:
                raise CheckpointError(
                    f"{name} in {shard} has rows of {shape[-1]} numbers in {format}, whose blocks have "
                    f"{numbers}; {remedy}"
                )
            stored = (*shape[:-1], shape[-1] // numbers * nbytes)
            raw = StoredTensor(name, shard, "U8", stored, start + offset, math.prod(stored))
        elif format in DTYPES:
            nbytes = math.prod(shape) * DTYPES[format].itemsize
            raw = StoredTensor(name, shard, format, shape, start + offset, nbytes)
            format = "plain"
        else:
            raw = StoredTensor(name, shard, format, shape, start + offset, 0)
            format = "plain"  # Weight.check refuses it if it is needed
        yield Weight(name, shape, (raw,), format)


class _Header:
    """A file that is read only up to `end`; a read beyond that fails before memory is allocated for it."""

    def __init__(self, file: io.BufferedReader, end: int) -> None:
        self._file = file
        self._end = end

    def read(self, nbytes: int) -> bytes:
        self._reach(nbytes)
        return self._file.read(nbytes)

    def skip(self, nbytes: int) -> None:
        self._reach(nbytes)
        self._file.seek(nbytes, io.SEEK_CUR)

    def tell(self) -> int:
        return self._file.tell()

    def _reach(self, nbytes: int) -> None:
        if nbytes > self._end - self._file.tell():
            raise struct.error(f"it ends at byte {self._end}")


def _aligned(position: int, alignment: Any) -> int:
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT:
        raise ValueError(f"an alignment of {alignment!r}")
    return -(-position // alignment) * alignment


def _numbers(file: _Header, format: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{format}", file.read(struct.calcsize(f"<{format}")))


def _string(file: _Header) -> str:
    (length,) = _numbers(file, "Q")
    return file.read(length).decode()


def _value(file: _Header, kind: int, *, whole: bool) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _numbers(file, NUMBERS[kind])[0]
    element, count = _numbers(file, "IQ")
    if element in NUMBERS and (whole or count <= MAX_ARRAY):
        return _numbers(file, f"{count}{NUMBERS[element]}")
    if element in NUMBERS:
        file.skip(count * struct.calcsize(f"<{NUMBERS[element]}"))
    elif element == STRING and whole:
        return [_string(file) for _ in range(count)]
    elif element == STRING:
        for _ in range(count):
            (length,) = _numbers(file, "Q")
            file.skip(length)
    else:
        raise ValueError(f"an array of type {element}")
    return count
