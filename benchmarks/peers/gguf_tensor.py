"""A tensor of a GGUF file, and how its numbers are made: from a checkpoint's, or at random.

Runs in the peer's environment, which has numpy and the `gguf` package but neither torch nor moe_local.
Layouts of blocks: github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape, quantize

Array = np.ndarray[Any, Any]
Read = Callable[[str], Array]
"""The checkpoint's tensor of a name, see `Safetensors.read`."""
FLOAT32 = GGMLQuantizationType.F32
Q4_0 = GGMLQuantizationType.Q4_0
Q8_0 = GGMLQuantizationType.Q8_0
MXFP4 = GGMLQuantizationType.MXFP4
PIECE_ROWS = 1024
"""Rows that a thread quantizes at once."""
LEVELS = {Q4_0: 16, Q8_0: 256}
"""How many values a block's numbers can have, one apart, if all their bits are used."""
MXFP4_DEVIATION = math.sqrt((0 + 0.5**2 + 1 + 1.5**2 + 2**2 + 3**2 + 4**2 + 6**2) / 8)
"""Standard deviation of its sixteen values, if all are equally likely."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file and how to make it."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    parts: Callable[[Read], Iterable[Array]]
    """From the checkpoint: what is put one below the other, each [some rows, shape[-1]]. What is uint8 is in
    its stored form already."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in float32 numbers or, for a quantized type, in bytes."""
        return self.shape if self.type == FLOAT32 else quant_shape_to_byte_shape(self.shape, self.type)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.type == FLOAT32 else np.uint8)

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize


class Safetensors:
    """The tensors of a checkpoint folder by name; read from the files when used."""

    def __init__(self, folder: Path, model: str = "model.") -> None:
        """`model`: what names begin with that are asked for as "model."."""
        self._model = model
        self._tensors: dict[str, tuple[mmap.mmap, int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = 8 + int.from_bytes(view[:8], "little")
            header = json.loads(view[8:start])
            header.pop("__metadata__", None)
            self._tensors |= {name: (view, start, entry) for name, entry in header.items()}

    def read(self, name: str) -> Array:
        """A view of the file, in which bf16 is uint16. Raises KeyError for unknown names and dtypes."""
        own = f"{self._model}{name.removeprefix('model.')}" if name.startswith("model.") else name
        view, start, entry = self._tensors[own]
        dtype = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U8": np.uint8}[entry["dtype"]]
        begin, _ = entry["data_offsets"]
        return np.frombuffer(view, dtype, math.prod(entry["shape"]), start + begin).reshape(entry["shape"])


def make(tensor: Tensor, read: Read, pool: ThreadPoolExecutor) -> Array:
    """The tensor in its stored form."""
    rows = np.empty((math.prod(tensor.shape[:-1]), tensor.stored_shape[-1]), tensor.stored_dtype)
    done = 0
    for part in tensor.parts(read):
        matrix = part.reshape(-1, part.shape[-1])
        starts = range(0, len(matrix), PIECE_ROWS)
        pieces = pool.map(lambda at, m=matrix: _stored(m[at : at + PIECE_ROWS], tensor.type), starts)
        for at, piece in zip(starts, pieces, strict=True):
            rows[done + at : done + at + len(piece)] = piece
        done += len(matrix)
    if done != len(rows):
        raise ValueError(f"{tensor.name} has {done} rows in the checkpoint, and {len(rows)} by its config")
    return rows.reshape(tensor.stored_shape)


def make_random(tensor: Tensor, rng: np.random.Generator) -> Array:
    """Random weights, at about the scale at which a matrix's output is as large as its input; norms and
    shortcuts (ssm_d) are ones, biases and other vectors zeros, but for decays (ssm_a), which are -1.

    Blocks are made directly in their stored form, from random bytes with scales at their start.
    """
    vector = len(tensor.shape) == 1 or tensor.shape[-1] == 1
    if vector or tensor.name.endswith(".bias") or "norm" in tensor.name:
        ones = "norm" in tensor.name or tensor.name.endswith(".ssm_d")
        value = 1 if ones else -1 if tensor.name.endswith(".ssm_a") else 0
        return np.full(tensor.shape, value, np.float32)
    scale = 1 / math.sqrt(tensor.shape[-1])
    if tensor.type == FLOAT32:
        return rng.standard_normal(tensor.shape, np.float32) * np.float32(scale)
    blocks = np.frombuffer(rng.bytes(tensor.nbytes), np.uint8)
    blocks = blocks.reshape(-1, GGML_QUANT_SIZES[tensor.type][1]).copy()
    if tensor.type == MXFP4:
        blocks[:, 0] = _exponents(scale / MXFP4_DEVIATION, len(blocks), rng)
    elif tensor.type in LEVELS:
        blocks[:, :2] = _steps(scale, LEVELS[tensor.type], len(blocks), rng).view(np.uint8).reshape(-1, 2)
    else:
        raise ValueError(f"no random weights are made of type {tensor.type.name}; use Q4_0")
    return blocks.reshape(tensor.stored_shape)


def _steps(scale: float, levels: int, count: int, rng: np.random.Generator) -> Array:
    """Scales of blocks whose numbers are equally likely levels around -0.5, such as 4 bits less 8, float16.

    Half are negative: with a mean other than 0, all tokens would soon have the same state and experts.
    """
    signed: Array = rng.uniform(0.8, 1.2, count) * rng.choice((-1, 1), count)
    return (signed * scale / math.sqrt((levels**2 - 1) / 12)).astype(np.float16)


def _exponents(scale: float, count: int, rng: np.random.Generator) -> Array:
    """Exponents of MXFP4's blocks, biased by 127: the two around `scale`, mixed to its mean square."""
    lower = math.floor(math.log2(scale))
    share = ((scale / 2**lower) ** 2 - 1) / 3
    higher: Array = rng.random(count) < share
    return (lower + 127 + higher).astype(np.uint8)


def floats(weights: Array) -> Array:
    """What `Safetensors.read` gave, as float32."""
    if weights.dtype == np.uint16:  # bf16 is the upper half of a float32
        return (weights.astype(np.uint32) << 16).view(np.float32)
    return weights.astype(np.float32)


def _stored(rows: Array, kind: GGMLQuantizationType) -> Array:
    if rows.dtype == np.uint8:
        return rows
    rows = np.ascontiguousarray(floats(rows))
    return rows if kind == FLOAT32 else quantize(rows, kind)
