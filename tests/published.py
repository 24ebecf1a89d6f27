"""Tiny checkpoints in the formats that publishers quantize to, each with its plain twin.

The twin has the same numbers in fp32, dequantized here in the plainest way: what loads from both is equal.
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
    """As DeepSeek-V3: every projection in E4M3, one scale for each block, the rest as it is.

    Scales of dtype float8_e8m0fnu are called `scale` and are powers of two, as DeepSeek-V4's. Returns the
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
    return _write(source, folder, quantize, settings)


def mxfp4(source: Path, folder: Path) -> tuple[Path, Path]:
    """As gpt-oss: the packed experts in blocks of 32, [E, out, in / 32, 16], and their exponents."""

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
    return _write(source, folder, quantize, settings)


def _write(
    source: Path,
    folder: Path,
    quantize: Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None],
    settings: dict[str, object],
) -> tuple[Path, Path]:
    """Both checkpoints; the quantized one in two shards, scales apart from their weights, and an index."""
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
