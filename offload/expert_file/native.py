"""Experts read from the checkpoint's own shards: without a second copy on disk or a second rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_local.cache.errors import CheckpointError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.shards import StoredTensor
from moe_local.offload.checkpoint.spec import MoELayer
from moe_local.offload.checkpoint.weights import Weight
from moe_local.offload.quantize import fp8, nvfp4
from moe_local.offload.quantize.layout import Layout, TensorSpec, make_layout
from moe_local.offload.quantize.packed import Nvfp4
from moe_local.offload.tiers.location import FileRange, ScatteredLocation

DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "uint8",
    "U8": "uint8",
    "I8": "uint8",
}
"""safetensors' dtype names -> those of layouts, in which exponents and pairs of 4-bit numbers are bytes."""

PLAIN = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class _Part(NamedTuple):
    """One segment of an expert's buffer, and the stored tensors that fill it one after the other."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]


class NativeExperts:
    """Each expert's location in the shards, and the layout of its buffer. Immutable; holds no file open.

    Used in place of an ExpertFile. A checkpoint has no checksums, so only what was checked when it was opened
    is known: headers match the config, and files are as long as their headers say.
    """

    format = "native"

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        """`folder` is where an expert file would be, for files that are kept beside it; it need not exist.

        Raises CheckpointError if some expert is stored in a way that kernels cannot read in place.
        """
        self.folder = folder
        self._checkpoint = checkpoint
        self._layouts: dict[object, Layout] = {}
        self._of = [
            [self._make(layer, e) for e in range(layer.num_experts)] for layer in checkpoint.spec.layers
        ]

    @property
    def formats(self) -> list[str]:
        """The formats of the experts' layouts."""
        return sorted({layout.format for layer in self._of for layout in layer})

    def layout(self, layer: int, expert: int) -> Layout:
        """The same object for all experts that are stored alike."""
        return self._of[layer][expert]

    def locate(self, key: ExpertKey) -> ScatteredLocation:
        shards = self._checkpoint.shards
        parts = self._parts(self._checkpoint.spec.layers[key.layer], key.expert)
        layout = self.layout(*key)
        starts = [segment.offset for segment in layout.segments]
        ranges = (
            placed
            for part, start in zip(parts, starts, strict=True)
            for placed in _placed(shards.folder, part.stored, start)
        )
        return ScatteredLocation(tuple(_joined(ranges)), shards.remedy)

    def check_integrity(self) -> None:
        """Raise CheckpointError if the shards are no longer those that were opened."""
        self._checkpoint.check_integrity()

    def _make(self, layer: MoELayer, expert: int) -> Layout:
        parts = self._parts(layer, expert)
        form = (layer.tensors, tuple(part[:-1] for part in parts))
        if form not in self._layouts:
            described = [(part.name, part.part, part.dtype, part.shape) for part in parts]
            self._layouts[form] = make_layout(_format(parts), layer.tensors, described)
        return self._layouts[form]

    def _parts(self, layer: MoELayer, expert: int) -> list[_Part]:
        pieces: Mapping[str, Sequence[Weight]] = self._checkpoint.expert_pieces(layer, expert)
        return [
            part
            for tensor in layer.tensors
            for part in _tensor_parts(tensor, pieces[tensor.name], transposed=layer.transposed)
        ]


def _tensor_parts(tensor: TensorSpec, pieces: Sequence[Weight], *, transposed: bool) -> Iterator[_Part]:
    """The segments of one tensor of an expert. Raises CheckpointError if kernels could not read it."""
    forms = {piece.format for piece in pieces}
    kinds = {tuple(stored.dtype for stored in piece.parts) for piece in pieces}
    turned = transposed and len(tensor.shape) == 2
    if read := forms - {"plain", "fp8", "mxfp4", "mxfp4_transposed", "nvfp4"}:
        raise _unreadable(pieces, f"as {' and '.join(sorted(read))}")
    if len(forms) > 1 or len(kinds) > 1 or any(dtype not in DTYPES for dtype in next(iter(kinds))):
        raise _unreadable(pieces, "in dtypes that no kernel reads together")
    (form,), (dtypes,) = forms, kinds
    numbers = tuple(piece.parts[0] for piece in pieces)
    if form == "plain":
        if turned and len(pieces) > 1:
            raise _unreadable(pieces, "in parts of a matrix that is kept the other way round")
        part, shape = ("transposed", tensor.shape[::-1]) if turned else ("values", tensor.shape)
        yield _Part(tensor.name, part, DTYPES[dtypes[0]], shape, numbers)
        return
    if turned != (form == "mxfp4_transposed"):
        raise _unreadable(pieces, "the other way round than quantized matrices are multiplied")
    rows, columns = tensor.shape
    scales = tuple(piece.parts[1] for piece in pieces)
    if form == "fp8":
        grid = _grid(pieces, rows, columns)
        yield _Part(tensor.name, "q", DTYPES[dtypes[0]], (rows, columns), numbers)
    elif form == "nvfp4":
        yield from _nvfp4_parts(tensor, pieces)
        grid = (rows, columns // nvfp4.BLOCK)
    else:
        grid = (rows, columns // 32)
        yield _Part(tensor.name, "q", "uint8", (rows, columns // 2), numbers)
    yield _Part(tensor.name, "scale", DTYPES[dtypes[1]], grid, scales)


def _nvfp4_parts(tensor: TensorSpec, pieces: Sequence[Weight]) -> Iterator[_Part]:
    """The codes, and the second scales: one for each of equally many rows."""
    rows, columns = tensor.shape
    seconds = {piece.decoder.part for piece in pieces if isinstance(piece.decoder, Nvfp4)}
    if len(seconds) > 1 or len({piece.shape for piece in pieces}) > 1:
        raise _unreadable(pieces, "with second scales that no kernel reads together")
    yield _Part(tensor.name, "q", "uint8", (rows, columns // 2), tuple(piece.parts[0] for piece in pieces))
    stored = tuple(piece.parts[2] for piece in pieces)
    yield _Part(tensor.name, seconds.pop(), "float32", (len(pieces),), stored)


def _grid(pieces: Sequence[Weight], rows: int, columns: int) -> tuple[int, int]:
    """The shape of the scales of FP8 pieces, stacked along the rows. Raises CheckpointError if they do not
    form one grid of equal blocks."""
    grids = [piece.parts[1].shape[-2:] if len(piece.parts[1].shape) > 1 else (1, 1) for piece in pieces]
    joined = sum(grid[0] for grid in grids), grids[0][1]
    whole = _block(rows, joined[0]), _block(columns, joined[1])
    for piece, grid in zip(pieces, grids, strict=True):
        block = _block(piece.shape[-2], grid[0], piece.block[0]), _block(columns, grid[1], piece.block[1])
        if block != whole or (len(pieces) > 1 and piece.shape[-2] % block[0]):
            raise _unreadable(pieces, "in blocks that end within the joined matrices")
    return joined


def _block(size: int, count: int, block: int = fp8.BLOCK) -> int:
    """How many numbers share a scale along one dimension; 0 if it cannot be determined."""
    try:
        return min(size, fp8.block_size(size, count, block))
    except ValueError:
        return 0


def _format(parts: Iterable[_Part]) -> str:
    """The layout's format: an exact codec's name if all parts are plain and laid out as that codec does."""
    parts = list(parts)
    dtypes = {part.dtype for part in parts}
    if any(part.part in nvfp4.SECONDS for part in parts):
        return "nvfp4"
    if all(part.part == "values" for part in parts) and len(dtypes) == 1 and dtypes <= PLAIN.keys():
        return PLAIN[dtypes.pop()]
    if any(part.dtype.startswith("float8") for part in parts):
        return "fp8"
    return "mxfp4" if any(part.part == "q" for part in parts) else "plain"


def _placed(folder: Path, stored: Iterable[StoredTensor], at: int) -> Iterator[FileRange]:
    for tensor in stored:
        yield FileRange(folder / tensor.shard, tensor.start, tensor.nbytes, at)
        at += tensor.nbytes


def _joined(ranges: Iterable[FileRange]) -> Iterator[FileRange]:
    """The same ranges, with those merged that are adjacent both in the file and in the buffer."""
    last: FileRange | None = None
    for part in ranges:
        if last is not None and _follows(last, part):
            last = last._replace(nbytes=last.nbytes + part.nbytes)
            continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last


def _follows(first: FileRange, second: FileRange) -> bool:
    return (first.path, first.offset + first.nbytes, first.at + first.nbytes) == (
        second.path,
        second.offset,
        second.at,
    )


def _unreadable(pieces: Sequence[Weight], how: str) -> CheckpointError:
    keys = ", ".join(piece.key for piece in pieces)
    return CheckpointError(
        f'{keys} cannot be read in place: stored {how}; use another format than experts="native"'
    )
