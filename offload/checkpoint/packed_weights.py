"""Finds the stored tensors that make up each packed weight, and checks their dtypes and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from moe_local.cache.errors import CheckpointError
from moe_local.cache.files import parse_json
from moe_local.offload.checkpoint.quantization import (
    AwqPacking,
    CompressedTensorsPacking,
    GptqPacking,
    Packing,
)
from moe_local.offload.checkpoint.shards import Shards, StoredTensor
from moe_local.offload.quantize.packed import Awq, BitsAndBytes4, Gptq, PackedDecoder, PackQuantized

STATE = ".quant_state.bitsandbytes__"
MOST_OF_A_STATE = 4096
"""Limit in bytes of the JSON with which bitsandbytes describes a weight; real ones have two hundred."""
FLOATS = ("F32", "F16", "BF16")
WORDS = ("I32",)


class Packed(NamedTuple):
    """One packed weight: the key and shape [out, in] of the decoded weight, its stored parts, its decoder."""

    key: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    decoder: PackedDecoder


def find_packed(shards: Shards, packing: Packing) -> Iterator[Packed]:
    """Every packed weight in `shards`. Reads nothing, except bitsandbytes' small description of each weight.

    Raises CheckpointError, naming the tensor, for parts that are missing or do not go together.
    """
    if isinstance(packing, GptqPacking):
        return _gptq(shards, packing)
    if isinstance(packing, AwqPacking):
        return _awq(shards, packing)
    if isinstance(packing, CompressedTensorsPacking):
        return _pack_quantized(shards, packing)
    return _bitsandbytes(shards)


class _Parts:
    """Finds the other tensors of one packed weight by the suffixes of their keys."""

    def __init__(self, shards: Shards, main: StoredTensor, stem: str) -> None:
        self._shards, self._main, self._stem = shards, main, stem

    def find(self, end: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> StoredTensor:
        found = self.perhaps(end)
        if found is None:
            raise CheckpointError(
                f"{self._main.key} in {self._main.shard} is packed and {self._stem}{end} is missing; "
                f"{self._shards.remedy}"
            )
        if found.dtype not in dtypes or (shape is not None and found.shape != shape):
            raise self.mismatch(
                found, f"{' or '.join(dtypes)} {'' if shape is None else list(shape)}".strip()
            )
        return found

    def perhaps(self, end: str) -> StoredTensor | None:
        return self._shards.tensors.get(self._stem + end)

    def mismatch(self, found: StoredTensor, wanted: str) -> CheckpointError:
        main = self._main
        return CheckpointError(
            f"{main.key} {list(main.shape)} in {main.shard} and {found.key} {found.dtype} "
            f"{list(found.shape)}, which should be {wanted}, do not go together; {self._shards.remedy}"
        )


def _bitsandbytes(shards: Shards) -> Iterator[Packed]:
    states = {key.partition(STATE)[0]: t for key, t in shards.tensors.items() if STATE in key}
    for state in states.values():
        if state.dtype != "U8" or state.nbytes > MOST_OF_A_STATE:
            raise CheckpointError(f"{state.key} in {state.shard} is no description; {shards.remedy}")
    read = shards.read([list(states.values())])[0] if states else []
    for (key, state), text in zip(states.items(), read, strict=True):
        q = shards.tensors.get(key)
        if q is None:
            raise CheckpointError(f"{state.key} is there and {key} is missing; {shards.remedy}")
        try:
            fields = parse_json(text.numpy().tobytes())
            decoder = _state(fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{state.key} in {state.shard} makes no sense; {shards.remedy}") from error
        parts = _Parts(shards, q, key)
        numbers = math.prod(decoder.shape)
        blocks = -(-numbers // decoder.block)
        if q.dtype != "U8" or math.prod(q.shape) != -(-numbers // 2):
            raise parts.mismatch(state, f"of {2 * math.prod(q.shape)} numbers")
        made = [q, parts.find(".absmax", ("U8",) if decoder.nested else ("F32",), (blocks,))]
        made.append(parts.find(".quant_map", ("F32",), (16,)))
        if decoder.nested:
            made.append(parts.find(".nested_absmax", ("F32",), (-(-blocks // decoder.nested),)))
            made.append(parts.find(".nested_quant_map", ("F32",), (256,)))
        yield Packed(key, decoder.shape, tuple(made), decoder)
    for key, tensor in shards.tensors.items():
        if key.endswith(".weight") and tensor.dtype == "U8" and key not in states:
            raise CheckpointError(
                f"{key} in {tensor.shard} is packed and {key}{STATE}* is missing; {shards.remedy}"
            )


def _state(fields: Any) -> BitsAndBytes4:
    shape = tuple(_size(size) for size in fields["shape"])
    if "nested_blocksize" not in fields:
        return BitsAndBytes4(shape, _size(fields["blocksize"]))
    nested, offset = _size(fields["nested_blocksize"]), float(fields["nested_offset"])
    return BitsAndBytes4(shape, _size(fields["blocksize"]), nested, offset)


def _size(found: Any) -> int:
    if type(found) is not int or not 0 < found < 2**40:
        raise ValueError(f"{found!r} is no size")
    return found


def _gptq(shards: Shards, packing: GptqPacking) -> Iterator[Packed]:
    for stem, words, parts in _each(shards, ".qweight"):
        rows, zeros = words.shape[1], parts.find(".qzeros", WORDS)
        bits = packing.bits
        if bits is None:
            bits = math.prod(zeros.shape[1:]) * 32 // max(rows, 1)
            if bits not in (4, 8):
                raise parts.mismatch(zeros, f"4 or 8 bits for each of {rows} outputs")
        columns = words.shape[0] * 32 // bits
        if packing.group is not None:
            groups = _groups(words, columns, packing.group, shards.remedy)
        else:
            groups = math.prod(zeros.shape[:1])
            if groups < 1 or columns % groups:
                raise parts.mismatch(zeros, f"for groups into which {columns} inputs can be divided")
        made = [words, parts.find(".qzeros", WORDS, (groups, rows * bits // 32))]
        made.append(parts.find(".scales", FLOATS, (groups, rows)))
        if parts.perhaps(".g_idx") is not None or packing.reordered:
            made.append(parts.find(".g_idx", WORDS, (columns,)))
        yield Packed(f"{stem}.weight", (rows, columns), tuple(made), Gptq(bits, packing.less_one))


def _awq(shards: Shards, packing: AwqPacking) -> Iterator[Packed]:
    for stem, words, parts in _each(shards, ".qweight"):
        columns, rows = words.shape[0], words.shape[1] * 8
        groups = _groups(words, columns, packing.group, shards.remedy)
        zeros = parts.find(".qzeros", WORDS, (groups, rows // 8))
        scales = parts.find(".scales", FLOATS, (groups, rows))
        yield Packed(f"{stem}.weight", (rows, columns), (words, zeros, scales), Awq())


def _pack_quantized(shards: Shards, packing: CompressedTensorsPacking) -> Iterator[Packed]:
    bits = packing.bits
    for stem, words, parts in _each(shards, ".weight_packed", besides="U8"):  # those are 4-bit floats
        rows, columns = words.shape[0], words.shape[1] * 32 // bits
        groups = _groups(words, columns, packing.group, shards.remedy)
        scale = parts.find(".weight_scale", FLOATS)
        if scale.shape not in ((rows, groups), (rows,) if groups == 1 else (), (1,), (1, 1)):
            raise parts.mismatch(scale, str([rows, groups]))
        if scale.shape == (rows,) and rows > 1:
            raise parts.mismatch(scale, str([rows, 1]))
        made = [words, scale]
        zeros = parts.perhaps(".weight_zero_point")
        if zeros is not None:
            shape = (-(-rows * bits // 32), groups) if zeros.dtype == "I32" else scale.shape
            made.append(parts.find(".weight_zero_point", ("I32", "I8"), shape))
        elif packing.zeros:
            parts.find(".weight_zero_point", ("I32", "I8"))
        order = parts.perhaps(".weight_g_idx")
        if order is not None:
            made.append(parts.find(".weight_g_idx", WORDS, (columns,)))
        decoder = PackQuantized(bits, zeros is not None, order is not None)
        yield Packed(f"{stem}.weight", (rows, columns), tuple(made), decoder)


def _each(shards: Shards, end: str, besides: str | None = None) -> Iterator[tuple[str, StoredTensor, _Parts]]:
    """(module's path, its packed numbers, its other tensors) for each key that ends with `end`, if its dtype
    is not `besides`."""
    for key, words in shards.tensors.items():
        if key.endswith(end) and words.dtype != besides:
            stem = key.removesuffix(end)
            if words.dtype != "I32" or len(words.shape) != 2:
                raise CheckpointError(
                    f"{key} in {words.shard} is {words.dtype} {list(words.shape)} and should be "
                    f"a matrix of I32; {shards.remedy}"
                )
            yield stem, words, _Parts(shards, words, stem)


def _groups(words: StoredTensor, columns: int, group: int, remedy: str) -> int:
    """How many groups the inputs form. Raises CheckpointError if `group` does not divide them evenly."""
    if group < 0:
        return 1
    if columns % group:
        raise CheckpointError(
            f"{words.key} in {words.shard} has {columns} inputs, which group_size {group} "
            f"does not divide; {remedy}"
        )
    return columns // group
