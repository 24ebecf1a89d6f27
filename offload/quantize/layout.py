"""Where each part of an expert is in its flat buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ALIGNMENT = 256
"""Every segment starts at a multiple of this many bytes, which suits CUDA's vector loads and the CPU
kernel."""

PAGE = 4096
"""An expert's buffer is padded to a multiple of this, so that direct I/O can read it in place."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One weight of one expert, named as in the model's experts module, without the expert dimension.

    `shape` is the shape in the expert file: matrices are always [out, in], even if the model transposes them.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive numbers of one dtype in the flat buffer: the part called `part` of tensor `name`."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The flat buffer of one expert: its codec's name, its tensors and their segments, its padded size."""

    format: str
    tensors: tuple[TensorSpec, ...]
    segments: tuple[Segment, ...]
    nbytes: int

    def parts(self, name: str) -> Iterator[Segment]:
        """The segments of tensor `name`, in buffer order."""
        return (segment for segment in self.segments if segment.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and ints, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Layout:
        """The inverse of `to_dict`, also after a round trip through JSON.

        Raises KeyError, TypeError or ValueError if `fields` is no layout.
        """
        tensors = (TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in fields["tensors"])
        segments = (Segment(**{**part, "shape": tuple(part["shape"])}) for part in fields["segments"])
        layout = cls(str(fields["format"]), tuple(tensors), tuple(segments), fields["nbytes"])
        layout.check_integrity()
        return layout

    def check_integrity(self) -> None:
        """Raise ValueError unless segments follow each other within the buffer and have the right sizes."""
        end = 0
        for segment in self.segments:
            sizes = (*segment.shape, segment.offset, segment.nbytes)
            if not all(type(n) is int and 0 <= n < 2**63 for n in sizes) or len(sizes) > 16:
                raise ValueError(f"segment {segment.name}.{segment.part} of sizes {sizes}")
            if segment.dtype not in DTYPE_BYTES:
                raise ValueError(f"segment {segment.name}.{segment.part} of unknown dtype {segment.dtype!r}")
            right = math.prod(segment.shape) * DTYPE_BYTES[segment.dtype]
            if segment.offset < end or right != segment.nbytes:
                raise ValueError(f"segment {segment.name}.{segment.part} is out of place")
            end = segment.offset + segment.nbytes
        if type(self.nbytes) is not int or self.nbytes < max(end, 1) or self.nbytes % PAGE:
            raise ValueError(f"a buffer of {self.nbytes} bytes for {end}")


DTYPE_BYTES = {
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
}


def make_layout(
    format: str,
    tensors: Sequence[TensorSpec],
    parts: Sequence[tuple[str, str, str, tuple[int, ...]]],
) -> Layout:
    """Place parts (tensor name, part name, dtype name, shape) one after another, each aligned.

    The size is padded to whole pages. The result depends only on the arguments, so a codec lays out an expert
    in the same way on every machine.
    """
    segments, offset = [], 0
    for name, part, dtype, shape in parts:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        segments.append(Segment(name, part, dtype, shape, offset, nbytes))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(format, tuple(tensors), tuple(segments), max(PAGE, -(-offset // PAGE) * PAGE))
