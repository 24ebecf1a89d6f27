"""Tiny checkpoints in the 4- and 8-bit formats that state everything in their tensors, each with its twin.

Several in one checkpoint, too, as NVIDIA Model Optimizer and llm-compressor write them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from support.published import E2M1, Tensors, compressed, is_linear, write

Made = tuple[Tensors, torch.Tensor]


def nvfp4(key: str, weight: torch.Tensor, *, divides: bool) -> Made:
    """E2M1 with E4M3 scales; the second scale is as compressed-tensors stores it if it `divides`, else as
    Model Optimizer does."""
    blocks = weight.float().unflatten(1, (-1, 16))
    second = 448 * 6 / blocks.abs().max()  # so that the largest block's scale is E4M3's largest number
    scale = (blocks.abs().amax(-1) / 6 * second).to(torch.float8_e4m3fn)
    whole = scale.float() / second if divides else scale.float() * (1 / second)
    q, twin = _e2m1(blocks, whole)
    if divides:
        return {f"{key}_packed": q, f"{key}_scale": scale, f"{key}_global_scale": second.view(1)}, twin
    return {key: q, f"{key}_scale": scale, f"{key}_scale_2": 1 / second}, twin


def mxfp4(key: str, weight: torch.Tensor) -> Made:
    """compressed-tensors' MXFP4."""
    blocks = weight.float().unflatten(1, (-1, 32))
    exponent = blocks.abs().amax(-1).clamp_min(1e-30).log2().floor() - 2
    q, twin = _e2m1(blocks, exponent.exp2())
    return {f"{key}_packed": q, f"{key}_scale": (exponent + 127).to(torch.uint8)}, twin


def mxfp8(key: str, weight: torch.Tensor) -> Made:
    blocks = weight.float().unflatten(1, (-1, 32))
    exponent = blocks.abs().amax(-1).clamp_min(1e-30).log2().floor() - 8
    q = (blocks / exponent.exp2().unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    twin = (q.float() * exponent.exp2().unsqueeze(-1)).flatten(1)
    return {key: q.flatten(1), f"{key}_scale": (exponent + 127).to(torch.uint8)}, twin


def fp8(key: str, weight: torch.Tensor, *, scales: str) -> Made:
    """Model Optimizer's FP8: `scales` is "tensor", "row", or "block", of 16 x 16."""
    numbers = weight.float()
    rows, columns = numbers.shape
    if scales == "block":
        grid = numbers.view(rows // 16, 16, columns // 16, 16)
        scale = grid.abs().amax((1, 3), keepdim=True) / 448
        spread = scale.expand_as(grid).reshape(rows, columns)
    else:
        scale = (numbers.abs().amax(1) if scales == "row" else numbers.abs().max()) / 448
        spread = scale.view(-1, 1)
    q = (numbers / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {key: q, f"{key}_scale": scale}, q.float() * spread


def int8(key: str, weight: torch.Tensor, *, symmetric: bool = True) -> Made:
    """compressed-tensors' integers with a scale for each row."""
    low, high = weight.float().aminmax(dim=1, keepdim=True)
    if symmetric:
        scale = (torch.maximum(-low, high) / 127).bfloat16()
        zero = torch.zeros_like(scale, dtype=torch.int8)
    else:
        scale = ((high - low) / 254).bfloat16()
        zero = (-128 - low / scale.float()).round().clamp(-128, 127).to(torch.int8)
    q = (weight.float() / scale.float() + zero).round().clamp(-128, 127).to(torch.int8)
    zeros = {} if symmetric else {f"{key}_zero_point": zero}
    return {key: q, f"{key}_scale": scale, **zeros}, (q.float() - zero.float()) * scale.float()


def compressed_tensors(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """A checkpoint of llm-compressor; of "mixed", attention is int8 and experts are NVFP4."""
    forms: dict[str, tuple[Callable[[str, torch.Tensor], Made], str, dict[str, object]]] = {
        "nvfp4": (
            lambda key, weight: nvfp4(key, weight, divides=True),
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
        "mxfp4": (
            mxfp4,
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        ),
        "mxfp8": (
            mxfp8,
            "mxfp8-quantized",
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
        ),
        "int8": (int8, "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        "int8_zeros": (
            lambda key, weight: int8(key, weight, symmetric=False),
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
        ),
    }
    if kind != "mixed":
        make, form, weights = forms[kind]
        return write(source, folder, _linear(make), compressed(form, weights))
    attention, experts = forms["int8"], forms["nvfp4"]
    groups = {
        f"group_{index}": {"targets": ["Linear"], "format": form, "weights": weights}
        for index, (_, form, weights) in enumerate([attention, experts])
    }
    settings = compressed("mixed-precision", {}) | {"config_groups": groups}
    quantize = _linear(lambda key, weight: (experts if ".experts." in key else attention)[0](key, weight))
    return write(source, folder, quantize, settings)


def modelopt(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """A checkpoint of Model Optimizer; of "MIXED_PRECISION", attention is FP8 and experts are NVFP4."""
    makers: dict[str, Callable[[str, torch.Tensor], Made]] = {
        "NVFP4": lambda key, weight: nvfp4(key, weight, divides=False),
        "FP8": lambda key, weight: fp8(key, weight, scales="tensor"),
        "FP8_PER_CHANNEL_PER_TOKEN": lambda key, weight: fp8(key, weight, scales="row"),
        "FP8_PB_WO": lambda key, weight: fp8(key, weight, scales="block"),
        "MXFP8": mxfp8,
    }
    settings: dict[str, object] = {"quant_method": "modelopt", "quant_algo": kind, "ignore": ["lm_head"]}

    def quantize(key: str, weight: torch.Tensor) -> Made:
        chosen = kind if kind != "MIXED_PRECISION" else "NVFP4" if ".experts." in key else "FP8"
        made, twin = makers[chosen](key, weight)
        stem = key.removesuffix(".weight")
        if key.endswith("v_proj.weight"):
            made[f"{stem}.v_scale"] = torch.tensor(0.5)
        return {**made, f"{stem}.input_scale": torch.tensor(0.01)}, twin

    if kind == "MIXED_PRECISION":
        layers = {"model.layers.0.self_attn.q_proj": "FP8", "model.layers.0.mlp.experts.0.up_proj": "NVFP4"}
        settings["quantized_layers"] = {name: {"quant_algo": algo} for name, algo in layers.items()}
    return write(source, folder, _linear(quantize), settings)


def _linear(
    make: Callable[[str, torch.Tensor], Made],
) -> Callable[[str, torch.Tensor], Made | None]:
    return lambda key, weight: make(key, weight) if is_linear(key, weight) else None


def _e2m1(blocks: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in pairs, the earlier in the lower half of a byte, and the numbers that they are."""
    scaled = blocks / scale.clamp_min(1e-30).unsqueeze(-1)
    codes = (scaled.unsqueeze(-1) - E2M1).abs().argmin(-1).to(torch.uint8)
    twin = (E2M1[codes.int()] * scale.unsqueeze(-1)).flatten(1)
    codes = codes.flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, twin
