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
from moe_local.offload.quantize.nvfp4 import BLOCK as NVFP4_BLOCK
from moe_local.offload.quantize.packed import Int8Rows, Nvfp4, PackedDecoder

PLAIN = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
BYTES = ("U8", "I8")
SCALES_OF_INPUTS = (".pre_quant_scale", ".svdquant_lora_a")
"""How the keys end of what Model Optimizer's AWQ and SVDQuant do to a layer's input."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight, with the key and shape that it would have if it were not quantized."""

    key: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    """The numbers and, if they are quantized, their scales."""
    format: str = "plain"
    """Or "fp8", "mxfp4", "mxfp4_transposed" (stored as [..., out, in] while the model has [..., in, out]), a
    format of GGUF; or, if there is a `decoder`, "nvfp4", "int8", or the quantization method."""
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
    if quantization.method == "mxfp4":
        weights = dict(_mxfp4(tensors, remedy))
    else:
        weights = dict(_scaled(tensors, quantization.block, remedy))
    if quantization.packing is not None:
        for key, shape, parts, decoder in find_packed(shards, quantization.packing):
            weights[key] = Weight(key, shape, parts, quantization.method, decoder=decoder)
    if scaled := next((key for key in tensors if key.endswith(SCALES_OF_INPUTS)), None):
        raise CheckpointError(
            f"{scaled} in {tensors[scaled].shard} changes a layer's input before its quantized weight, "
            "which is not supported; use the model's bf16 or fp16 checkpoint"
        )
    scales = {part.key for weight in weights.values() for part in weight.parts}
    rest = (tensor for key, tensor in tensors.items() if key not in scales and not _is_aside(key))
    return weights | {tensor.key: _plain(tensor) for tensor in rest}


def _plain(tensor: StoredTensor) -> Weight:
    return Weight(tensor.key, tensor.shape, (tensor,))


def _scaled(
    tensors: Mapping[str, StoredTensor], block: tuple[int, int] | None, remedy: str
) -> Iterator[tuple[str, Weight]]:
    """Weights whose numbers have scales in a tensor beside them, which say the format: FP8, and bytes that
    are MXFP4, NVFP4 or int8."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (*FP8, *BYTES):
            continue
        key = name.removesuffix("_packed")  # as compressed-tensors calls 4-bit numbers
        scale = next((tensors[scale] for scale in _scale_names(key) if scale in tensors), None)
        if scale is None:
            continue
        if tensor.dtype in FP8:
            yield key, _fp8(key, tensor, scale, block, remedy)
        elif scale.dtype in PLAIN:
            yield key, _int8(key, tensor, scale, tensors.get(f"{key}_zero_point"), remedy)
        elif scale.dtype in FP8:
            yield key, _nvfp4(key, tensor, scale, tensors, remedy)
        else:  # DeepSeek V4, compressed-tensors
            shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
            if shape[:-1] != scale.shape[:-1] or shape[-1] != mxfp4.BLOCK * scale.shape[-1]:
                raise _mismatch(tensor, scale, remedy)
            yield key, Weight(key, shape, (tensor, scale), "mxfp4")


def _fp8(
    key: str, tensor: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None, remedy: str
) -> Weight:
    rows, columns = tensor.shape[-2:]
    block = block or (rows, columns)
    if WHOLE in block:
        block = (block[0], columns)
    if len(scale.shape) == 4 and scale.shape[1::2] == (1, 1):  # Model Optimizer's blocks
        scale = replace(scale, shape=scale.shape[::2])
    if scale.shape == (rows,) and rows > 1 and block == (1, columns):  # and rows
        scale = replace(scale, shape=(rows, 1))
    if len(scale.shape) == 1 and scale.shape != (1,) and len(tensor.shape) == 2:
        raise _mismatch(tensor, scale, remedy)
    grid = scale.shape if len(scale.shape) > 1 else (*tensor.shape[:-2], 1, 1)
    try:
        for size, count, length in zip(tensor.shape[-2:], grid[-2:], block, strict=True):
            fp8.block_size(size, count, length)
    except ValueError as error:
        raise _mismatch(tensor, scale, remedy) from error
    return Weight(key, tensor.shape, (tensor, scale), "fp8", block)


def _nvfp4(
    key: str,
    tensor: StoredTensor,
    scale: StoredTensor,
    tensors: Mapping[str, StoredTensor],
    remedy: str,
) -> Weight:
    """The second scale multiplies in Model Optimizer's files, and divides in those of compressed-tensors."""
    rows, columns = tensor.shape[0], 2 * tensor.shape[-1]
    if len(tensor.shape) != 2 or scale.shape != (rows, columns // NVFP4_BLOCK) or columns % NVFP4_BLOCK:
        raise _mismatch(tensor, scale, remedy)
    divides = f"{key}_global_scale" in tensors
    second = tensors.get(f"{key}_global_scale" if divides else f"{key}_scale_2")
    if second is None:
        raise CheckpointError(
            f"{tensor.key} in {tensor.shard} is stored in NVFP4 and its second scale is missing; {remedy}"
        )
    if second.dtype != "F32" or second.shape not in ((), (1,)):
        raise _mismatch(tensor, second, remedy)
    return Weight(key, (rows, columns), (tensor, scale, second), "nvfp4", decoder=Nvfp4(divides))


def _int8(
    key: str, tensor: StoredTensor, scale: StoredTensor, zeros: StoredTensor | None, remedy: str
) -> Weight:
    """compressed-tensors: a scale, and perhaps a zero point, for each row or for the tensor."""
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 0
    for part in (scale, zeros):
        if part is not None and (not rows or part.shape not in ((rows, 1), (1,), (1, 1), ())):
            raise _mismatch(tensor, part, remedy)
    if tensor.dtype != "I8" or (zeros is not None and zeros.dtype != "I8"):
        raise _mismatch(tensor, zeros or scale, remedy)
    parts = (tensor, scale) if zeros is None else (tensor, scale, zeros)
    return Weight(key, tensor.shape, parts, "int8", decoder=Int8Rows())


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
    yield f"{key}_scale"  # compressed-tensors, Model Optimizer
    if key.endswith(".weight"):  # DeepSeek V4, Mistral
        stem = key.removesuffix("weight")
        yield from (f"{stem}scale", f"{stem}qscale_weight")


def _is_aside(key: str) -> bool:
    """Whether a tensor is a scale of activations, or describes a packed weight that has been found."""
    aside = (
        *("activation_scale", "input_scale", "input_global_scale", "qscale_act", ".weight_shape", ".g_idx"),
        *(".k_scale", ".v_scale"),  # of cached keys and values
    )
    return key.endswith(aside) or STATE in key


def _matrix(scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The scales as a grid; the scale of a whole tensor as a grid of one element."""
    return scale if scale.dim() == q.dim() else scale.reshape(*q.shape[:-2], 1, 1)


def _mismatch(tensor: StoredTensor, scale: StoredTensor, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.key} {list(tensor.shape)} in {tensor.shard} and its scales {scale.key} {list(scale.shape)} "
        f"do not go together; {remedy}"
    )
