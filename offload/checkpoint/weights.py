"""Weights as the model has them, and the stored tensors that each is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.packed_weights import STATE, find_packed
from moe_local.offload.checkpoint.quantization import WHOLE, Quantization
from moe_local.offload.checkpoint.shards import Shards, StoredTensor
from moe_local.offload.quantize import fp8, gguf, mxfp4
from moe_local.offload.quantize.packed import PackedDecoder

PLAIN = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
BYTES = ("U8", "I8")


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight, with the key and shape that it would have if it were not quantized."""

    key: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    """The numbers and, if they are quantized, their scales."""
    format: str = "plain"
    """Or "fp8", "mxfp4", "mxfp4_transposed" (stored as [..., out, in] while the model has [..., in, out]), a
    format of GGUF, or the quantization method if there is a `decoder`."""
    block: tuple[int, int] = (fp8.BLOCK, fp8.BLOCK)
    """Rows and columns that share a scale, for FP8."""
    undo: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Converts decoded numbers of the stored shape to the model's, for GGUF; None if they are the same."""
    decoder: PackedDecoder | None = None
    """Decodes weights that are packed in other ways."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoded weight: float32 if it is quantized, else the stored dtype."""
        return self.parts[0].torch_dtype if self.format == "plain" else torch.float32

    def at(self, row: int) -> Weight:
        """Row `row` of this weight [E, ...], as a weight [1, ...]."""
        parts = tuple(part.at(row) for part in self.parts)
        return replace(self, shape=(1, *self.shape[1:]), parts=parts)

    def decode(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight made from its stored parts: in the same memory if it is plain and in order, else in new.

        Raises CheckpointError for parts with invalid numbers.
        """
        if self.decoder is not None:
            try:
                return self.decoder.decode(parts)
            except CheckpointError as error:
                raise CheckpointError(f"{self.key} in {self.parts[0].shard}: {error}") from error
        if self.format == "plain" or self.format in gguf.FORMATS:
            numbers = parts[0]
            if self.format != "plain":
                numbers = gguf.dequantize_gguf(numbers, self.format)
            return numbers.view(self.shape) if self.undo is None else self.undo(numbers)
        q, scale = parts
        if self.format == "fp8":
            return fp8.dequantize_fp8(q, _matrix(scale, q), torch.float32, self.block)
        q, scale = q.view(torch.uint8).flatten(len(scale.shape) - 1), scale.view(torch.uint8)
        numbers = mxfp4.dequantize_mxfp4(q, scale, torch.float32)
        return numbers.transpose(-2, -1) if self.format == "mxfp4_transposed" else numbers

    def check(self, remedy: str) -> None:
        """Raise CheckpointError for a dtype that cannot be read, and for FP8 numbers without scales."""
        if self.format != "plain":
            return
        (stored,) = self.parts
        if stored.dtype in FP8:
            raise CheckpointError(
                f"tensor {self.key} in {stored.shard} is stored in FP8 and its scales are missing; {remedy}"
            )
        if stored.dtype not in PLAIN:
            raise CheckpointError(
                f"tensor {self.key} in {stored.shard} is stored as {stored.dtype}, a format in which weights "
                "are not read; use the model's bf16 or fp16 checkpoint"
            )


def find_weights(shards: Shards, quantization: Quantization | None) -> dict[str, Weight]:
    """Key -> weight for all stored tensors. Scales are part of their weight and not listed.

    Raises CheckpointError, naming both tensors, for scales that do not fit their weight.
    """
    tensors, remedy = shards.tensors, shards.remedy
    if quantization is None:
        return {key: _plain(tensor) for key, tensor in tensors.items()}
    if quantization.packing is not None:
        method = quantization.method
        weights = {
            packed.key: Weight(packed.key, packed.shape, packed.parts, method, decoder=packed.decoder)
            for packed in find_packed(shards, quantization.packing)
        }
    elif quantization.method == "fp8":
        weights = dict(_fp8(tensors, quantization, remedy))
    else:
        weights = dict(_mxfp4(tensors, remedy))
    scales = {part.key for weight in weights.values() for part in weight.parts}
    rest = (tensor for key, tensor in tensors.items() if key not in scales and not _is_aside(key))
    return weights | {tensor.key: _plain(tensor) for tensor in rest}


def _plain(tensor: StoredTensor) -> Weight:
    return Weight(tensor.key, tensor.shape, (tensor,))


def _fp8(
    tensors: Mapping[str, StoredTensor], quantization: Quantization, remedy: str
) -> Iterator[tuple[str, Weight]]:
    for key, tensor in tensors.items():
        scale = next((tensors[name] for name in _scale_names(key) if name in tensors), None)
        if scale is None or tensor.dtype not in (*FP8, *BYTES):
            continue
        if tensor.dtype in BYTES:  # each byte holds two 4-bit numbers
            shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
            if shape[:-1] != scale.shape[:-1] or shape[-1] != mxfp4.BLOCK * scale.shape[-1]:
                raise _mismatch(tensor, scale, remedy)
            yield key, Weight(key, shape, (tensor, scale), "mxfp4")
            continue
        block = quantization.block or (tensor.shape[-2], tensor.shape[-1])
        if WHOLE in block:
            block = (block[0], tensor.shape[-1])
        if len(scale.shape) == 1 and scale.shape != (1,) and len(tensor.shape) == 2:
            raise _mismatch(tensor, scale, remedy)
        grid = scale.shape if len(scale.shape) > 1 else (*tensor.shape[:-2], 1, 1)
        try:
            for size, count, length in zip(tensor.shape[-2:], grid[-2:], block, strict=True):
                fp8.block_size(size, count, length)
        except ValueError as error:
            raise _mismatch(tensor, scale, remedy) from error
        yield key, Weight(key, tensor.shape, (tensor, scale), "fp8", block)


def _mxfp4(tensors: Mapping[str, StoredTensor], remedy: str) -> Iterator[tuple[str, Weight]]:
    """gpt-oss: blocks [E, out, in / 32, 16] and scales [E, out, in / 32]; the model has [E, in, out]."""
    for name, blocks in tensors.items():
        key = name.removesuffix("_blocks")
        scales = tensors.get(f"{key}_scales")
        if key == name or scales is None:
            continue
        if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, mxfp4.BLOCK // 2):
            raise _mismatch(blocks, scales, remedy)
        experts, rows, groups, _ = blocks.shape
        shape = (experts, groups * mxfp4.BLOCK, rows)
        yield key, Weight(key, shape, (blocks, scales), "mxfp4_transposed")


def _scale_names(key: str) -> Iterator[str]:
    yield f"{key}_scale_inv"
    yield f"{key}_scale"  # compressed-tensors
    if key.endswith(".weight"):  # DeepSeek V4, Mistral
        stem = key.removesuffix("weight")
        yield from (f"{stem}scale", f"{stem}qscale_weight")


def _is_aside(key: str) -> bool:
    """Whether a tensor is a scale of activations, or describes a packed weight that has been found."""
    aside = ("activation_scale", "input_scale", "qscale_act", ".weight_shape", ".g_idx")
    return key.endswith(aside) or STATE in key


def _matrix(scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The scales as a grid; the scale of a whole tensor as a grid of one element."""
    return scale if scale.dim() == q.dim() else scale.reshape(*q.shape[:-2], 1, 1)


def _mismatch(tensor: StoredTensor, scale: StoredTensor, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.key} {list(tensor.shape)} in {tensor.shard} and its scales {scale.key} {list(scale.shape)} "
        f"do not go together; {remedy}"
    )
