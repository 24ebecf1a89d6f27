"""Tiny checkpoints in the formats that publishers quantize to, each with an unquantized twin.

The twin has the same numbers in fp32, dequantized here in the simplest way; both must load as equal weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp8(
    source: Path, folder: Path, block: int = 16, scales: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """Quantize as DeepSeek-V3: every projection in E4M3 with a scale for each block; the rest is unchanged.

    Scales of dtype float8_e8m0fnu are called `scale` and are powers of two, as in DeepSeek-V4. Returns the
    quantized folder and its twin.
    """
    exponents = scales == torch.float8_e8m0fnu

    def quantize(key: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if weight.dim() != 2 or (not key.endswith("_proj.weight") and ".experts." not in key):
            return None
        grid = [-(-size // block) for size in weight.shape]
        blocks = torch.zeros(grid[0] * block, grid[1] * block)
        blocks[: weight.shape[0], : weight.shape[1]] = weight
        scale = blocks.view(grid[0], block, grid[1], block).abs().amax((1, 3)).clamp_min(1e-12) / 448
        scale = (scale.log2().ceil().exp2() if exponents else scale).to(scales)
        spread = scale.float().repeat_interleave(block, 0).repeat_interleave(block, 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        q = (weight.float() / spread).to(torch.float8_e4m3fn)
        name = key.removesuffix("weight") + "scale" if exponents else f"{key}_scale_inv"
        return {key: q, name: scale}, q.float() * spread

    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }
    return write(source, folder, quantize, settings)


def mxfp4(source: Path, folder: Path) -> tuple[Path, Path]:
    """Quantize as gpt-oss: packed experts in blocks of 32, [E, out, in / 32, 16], and their exponents."""

    def quantize(key: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not key.endswith("experts.gate_up_proj") and not key.endswith("experts.down_proj"):
            return None
        blocks = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
        exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp_min(1e-30))).int() - 2
        scaled = blocks / torch.exp2(exponent.float())[..., None]
        q = (scaled[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
        packed = q[..., 0::2] | (q[..., 1::2] << 4)
        twin = (
            (E2M1[q.int()] * torch.exp2(exponent.float())[..., None]).flatten(2).transpose(1, 2).contiguous()
        )
        return {f"{key}_blocks": packed, f"{key}_scales": (exponent + 127).to(torch.uint8)}, twin

    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return write(source, folder, quantize, settings)


def bitsandbytes(
    source: Path, folder: Path, kind: str = "nf4", nested: bool = True, block: int = 64
) -> tuple[Path, Path]:
    """Quantize as transformers 4 saves load_in_4bit=True, packed and described by bitsandbytes itself; the
    twin is decoded by its dequantize_4bit. Attention's k_proj is not quantized, to test
    llm_int8_skip_modules."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def quantize(key: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_linear(key, weight):
            return None
        q, state = quantize_4bit(weight.float(), blocksize=block, compress_statistics=nested, quant_type=kind)
        described = {f"{key}.{name}": part.clone() for name, part in state.as_dict(packed=True).items()}
        # bitsandbytes 0.50.2 misplaces scales on AVX512 CPUs unless a row is a whole number of blocks.
        state.shape = torch.Size([1, weight.numel()])
        return {key: q, **described}, dequantize_4bit(q, state).view(weight.shape)

    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", "k_proj"],
    }
    return write(source, folder, quantize, settings)


def gptq(
    source: Path,
    folder: Path,
    bits: int = 4,
    group: int = 32,
    act_order: bool = False,
    v2: bool = False,
    symmetric: bool = True,
) -> tuple[Path, Path]:
    """Quantize as AutoGPTQ or, with `v2`, GPTQModel; with `act_order`, groups consist of arbitrary inputs."""

    def quantize(key: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_linear(key, weight):
            return None
        return _gptq_tensors(key, weight, bits, group, act_order, v2, symmetric)

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": symmetric,
        **({"checkpoint_format": "gptq_v2"} if v2 else {}),
    }
    return write(source, folder, quantize, settings)


def mixed_gptq(source: Path, folder: Path, settings: dict[str, object]) -> tuple[Path, Path]:
    """Quantize as AutoRound or GPTQModel, with attention in 8 bits and other groups than the rest, down
    projections of experts in 4 bits and one group, and those of one expert left out."""

    def quantize(key: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_linear(key, weight) or ".experts.1." in key:
            return None
        bits, group = (8, 16) if "self_attn" in key else (4, -1 if "down_proj" in key else 32)
        return _gptq_tensors(key, weight, bits, group)

    return write(source, folder, quantize, {"bits": 4, "group_size": 32, "sym": True, **settings})


def auto_round(source: Path, folder: Path) -> tuple[Path, Path]:
    """AutoRound's packing in the manner of AWQ."""
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "sym": False}
    return awq(source, folder, settings=settings)


def _gptq_tensors(
    key: str,
    weight: torch.Tensor,
    bits: int,
    group: int,
    act_order: bool = False,
    v2: bool = False,
    symmetric: bool = True,
) -> tuple[Tensors, torch.Tensor]:
    out, inputs = weight.shape
    index = torch.arange(inputs) // (inputs if group < 0 else group)
    if act_order:
        index = index[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
    q, zero, scale, twin = _grouped(weight.float(), index, bits, symmetric)
    stem = key.removesuffix(".weight")
    tensors = {
        f"{stem}.qweight": _words(q.T, bits, 0),
        f"{stem}.qzeros": _words(zero.T if v2 else (zero.T - 1) % 2**bits, bits, 1),
        f"{stem}.scales": scale.T.contiguous(),
        f"{stem}.g_idx": index.int(),
    }
    if ".experts." in key:  # AutoGPTQ writes a bias of zeros for layers without one
        tensors[f"{stem}.bias"] = torch.zeros(out, dtype=torch.float16)
    return tensors, twin


def awq(
    source: Path, folder: Path, group: int = 32, settings: dict[str, object] | None = None
) -> tuple[Path, Path]:
    """Quantize as AutoAWQ's "gemm": eight columns per word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def quantize(key: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_linear(key, weight):
            return None
        q, zero, scale, twin = _grouped(weight.float(), torch.arange(weight.shape[1]) // group, 4, False)
        stem = key.removesuffix(".weight")
        tensors = {
            f"{stem}.qweight": _words(q.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4, 1),
            f"{stem}.qzeros": _words(zero.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4, 1),
            f"{stem}.scales": scale.T.contiguous(),
        }
        return tensors, twin

    settings = settings or {"quant_method": "awq", "zero_point": True, "version": "gemm"}
    return write(source, folder, quantize, {"bits": 4, "group_size": group, **settings})


def pack_quantized(
    source: Path,
    folder: Path,
    bits: int = 4,
    strategy: str = "group",
    symmetric: bool = True,
    act_order: bool = False,
) -> tuple[Path, Path]:
    """Quantize as compressed-tensors' "pack-quantized": signed numbers in groups of 32, or one scale per
    row."""

    def quantize(key: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_linear(key, weight):
            return None
        inputs = weight.shape[1]
        index = torch.arange(inputs) // (32 if strategy == "group" else inputs)
        if act_order:
            index = index[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
        q, zero, scale, twin = _grouped(weight.float(), index, bits, symmetric)
        stem = key.removesuffix(".weight")
        tensors = {
            f"{stem}.weight_packed": _words(q, bits, 1),
            f"{stem}.weight_scale": scale,
            f"{stem}.weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors[f"{stem}.weight_zero_point"] = _words(zero, bits, 0)
        if act_order:
            tensors[f"{stem}.weight_g_idx"] = index.int()
        return tensors, twin

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": 32 if strategy == "group" else None,
    }
    return write(source, folder, quantize, compressed("pack-quantized", weights))


def float_quantized(source: Path, folder: Path, strategy: str = "channel") -> tuple[Path, Path]:
    """Quantize as compressed-tensors' FP8: E4M3 with a scale for each row, or one for the whole matrix."""

    def quantize(key: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_linear(key, weight):
            return None
        largest = (
            weight.float().abs().amax(1, keepdim=True)
            if strategy == "channel"
            else weight.float().abs().max()
        )
        scale = (
            (largest / 448).bfloat16().reshape(-1, 1) if strategy == "channel" else (largest / 448).reshape(1)
        )
        q = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
        return {key: q, f"{key}_scale": scale}, q.float() * scale.float()

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    return write(source, folder, quantize, compressed("float-quantized", weights))


def compressed(form: str, weights: dict[str, object]) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def is_linear(key: str, weight: torch.Tensor) -> bool:
    chosen = key.endswith("_proj.weight") or ".experts." in key
    return weight.dim() == 2 and chosen and not key.endswith("k_proj.weight")


def _grouped(
    weight: torch.Tensor, index: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, ...]:
    """(codes [out, in], zero points [out, G], fp16 scales [out, G], decoded weights [out, in]), where input i
    is in group index[i]."""
    groups = int(index.max()) + 1
    most, half = 2**bits - 1, 2 ** (bits - 1)
    zero = torch.full((len(weight), groups), half)
    scale = torch.empty(len(weight), groups, dtype=torch.float16)
    q, twin = torch.empty(weight.shape, dtype=torch.long), torch.empty(weight.shape)
    for group in range(groups):
        part = weight[:, index == group]
        if symmetric:
            scale[:, group] = part.abs().amax(1) / (half - 1)
        else:
            scale[:, group] = (part.amax(1) - part.amin(1)) / most
            zero[:, group] = (-part.amin(1) / scale[:, group].float()).round().clamp(0, most)
    for column, group in enumerate(index.tolist()):
        step, middle = scale[:, group].float(), zero[:, group]
        q[:, column] = ((weight[:, column] / step).round() + middle).clamp(0, most)
        twin[:, column] = (q[:, column] - middle) * step
    return q, zero, scale, twin


def _words(numbers: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Pack numbers along `dim` into int32, the first in the lowest bits; pad the last word with zeros."""
    numbers = numbers.movedim(dim, -1)
    each = 32 // bits
    words = torch.zeros(*numbers.shape[:-1], -(-numbers.shape[-1] // each), dtype=torch.long)
    for place in range(numbers.shape[-1]):
        words[..., place // each] |= numbers[..., place] << (bits * (place % each))
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.int().movedim(-1, dim).contiguous()


def write(
    source: Path,
    folder: Path,
    quantize: Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None],
    settings: dict[str, object],
) -> tuple[Path, Path]:
    """Write both checkpoints; the quantized one in two shards, with scales in another shard than their
    weights, and an index."""
    quantized, twin = folder / "quantized", folder / "twin"
    for target in (quantized, twin):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    shards: list[Tensors] = [{}, {}]
    plain: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        for key, weight in load_file(path).items():
            made = quantize(key, weight)
            if made is None:
                shards[0][key] = plain[key] = weight
            else:
                (name, numbers), *scales = made[0].items()
                shards[0][name], plain[key] = numbers, made[1]
                shards[1] |= dict(scales)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, quantized / name, {"format": "pt"})
    weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (quantized / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": settings}
    (quantized / "config.json").write_text(json.dumps(config))
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    return quantized, twin
