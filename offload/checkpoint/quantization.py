"""How a checkpoint's publisher quantized its weights, by its config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize import fp8, mxfp4

METHODS = ("fp8", "mxfp4", "bitsandbytes", "gptq", "awq", "auto-round", "compressed-tensors", "modelopt")
"""Transformers' names of the quantization methods that can be read."""

WHOLE = 2**30
"""As a block's number of columns: all columns of the matrix."""


@dataclass(frozen=True, slots=True)
class BitsAndBytesPacking:
    """4 bits; all other settings are stored beside each weight."""


@dataclass(frozen=True, slots=True)
class GptqPacking:
    bits: int | None
    """Per number: 4 or 8; None: which of them, the shapes of each weight's tensors say."""
    group: int | None
    """How many inputs share a scale; -1: all; None: as with `bits`."""
    less_one: bool
    """Whether zero points are stored minus one."""
    reordered: bool
    """Whether the file must say which group each input belongs to."""


@dataclass(frozen=True, slots=True)
class AwqPacking:
    """Numbers have 4 bits."""

    group: int
    """How many inputs share a scale; -1: all."""


@dataclass(frozen=True, slots=True)
class CompressedTensorsPacking:
    bits: int
    """Per number: 4 or 8."""
    group: int
    """How many inputs share a scale; -1: all."""
    zeros: bool
    """Whether the file must have zero points."""


Packing = BitsAndBytesPacking | GptqPacking | AwqPacking | CompressedTensorsPacking


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the publisher quantized the weights; `method` is one of METHODS."""

    method: str
    experts: str
    """Format of the routed experts: "fp8", "mxfp4", "nvfp4", or `method` if no kernel reads them in place, or
    if only the tensors say which format a weight has."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale in FP8; None: each tensor has one scale."""
    packing: Packing | None = None
    """How weights, experts' and dense ones, are packed if their tensors alone do not say it; None if they do,
    as those of FP8, MXFP4 and NVFP4."""

    @classmethod
    def of(cls, config: Any) -> Quantization | None:
        """Read it from transformers' config or the fields of a config.json; None if nothing is quantized.

        Ignores how activations were scaled in training, which does not matter here. Raises CheckpointError,
        whose message does not name the file, for methods that cannot be read and invalid settings.
        """
        settings = _settings(config)
        if settings is None:
            return None
        bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
        method = str(settings.get("quant_method", "bitsandbytes" if bitsandbytes else "unknown"))
        method = method.removeprefix("intel/")  # what early files of auto-round have
        if method.startswith("modelopt"):
            return _modelopt(settings)
        if method not in METHODS:
            raise CheckpointError(
                f"the weights are already quantized ({method[:80]}), and of such formats only "
                f"{', '.join(METHODS[:-1])} and {METHODS[-1]} are read; "
                "use the model's bf16 or fp16 checkpoint"
            )
        if method == "mxfp4":
            return cls(method, "mxfp4")
        if method == "bitsandbytes":
            return _bitsandbytes(settings)
        if method == "gptq":
            return _gptq(settings)
        if method == "awq":
            return _awq(settings)
        if method == "auto-round":
            return _auto_round(settings)
        if method == "compressed-tensors":
            return _compressed_tensors(settings)
        block = settings.get("weight_block_size", (fp8.BLOCK, fp8.BLOCK))
        if block is not None and not _is_block(block):
            raise CheckpointError(f"weight_block_size {block!r} is not two numbers from 1 up")
        experts = "mxfp4" if settings.get("expert_dtype") == "fp4" else "fp8"
        return cls(method, experts, None if block is None else (block[0], block[1]))


def _bitsandbytes(settings: Mapping[str, Any]) -> Quantization:
    if not settings.get("load_in_4bit"):
        raise _refused("bitsandbytes", "load_in_4bit", settings.get("load_in_4bit"), "true")
    _one_of("bitsandbytes", settings, "bnb_4bit_quant_type", ("fp4", "nf4"), "fp4")
    _one_of("bitsandbytes", settings, "bnb_4bit_quant_storage", ("uint8",), "uint8")
    return Quantization("bitsandbytes", "bitsandbytes", packing=BitsAndBytesPacking())


def _gptq(settings: Mapping[str, Any]) -> Quantization:
    bits = _one_of("gptq", settings, "bits", (4, 8))
    form = _one_of("gptq", settings, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    if settings.get("is_marlin_format"):
        raise _refused("gptq", "is_marlin_format", True, "false")
    group, reordered = _group("gptq", settings), bool(settings.get("desc_act"))
    dynamic = settings.get("dynamic")
    others = [
        changed
        for name, changed in (dynamic.items() if isinstance(dynamic, Mapping) else ())
        if not str(name).startswith("-:")  # modules that are left out
    ]
    packing = GptqPacking(bits, group, less_one=form == "gptq", reordered=reordered)
    return Quantization("gptq", "gptq", packing=_with_others("gptq", "dynamic", packing, others))


def _with_others(method: str, name: str, packing: GptqPacking, others: Iterable[Any]) -> GptqPacking:
    """The same, if some modules have settings of their own. Raises CheckpointError for what is not read."""
    for other in others:
        found = other if isinstance(other, Mapping) else {}
        if found.get("bits") not in (None, 4, 8):
            raise _refused(method, f"{name} of bits", found["bits"], "4 or 8")
        if found:
            packing = replace(packing, bits=None, group=None)
    return packing


def _auto_round(settings: Mapping[str, Any]) -> Quantization:
    """Intel's AutoRound, which packs as GPTQ or AWQ do; what it left out has more bits, or floats."""
    method = "auto-round"
    _one_of(method, settings, "data_type", ("int",), "int")
    bits, group = _one_of(method, settings, "bits", (4, 8)), _group(method, settings)
    extra = settings.get("extra_config")
    others = [
        {
            name: other[name]
            for name in ("bits", "group_size")
            if other.get(name) not in (None, settings.get(name))
        }
        for other in (extra.values() if isinstance(extra, Mapping) else ())
        if isinstance(other, Mapping)
        and other.get("data_type", "int") == "int"
        and other.get("bits") not in (16, 32)
    ]
    named = str(settings.get("packing_format") or settings.get("backend") or "auto_round:auto_gptq")
    if "gptq" in named:
        packing = GptqPacking(bits, group, less_one=True, reordered=False)
        return Quantization(method, method, packing=_with_others(method, "extra_config", packing, others))
    if "awq" in named and bits == 4 and not any(others):
        return Quantization(method, method, packing=AwqPacking(group))
    raise _refused(method, "packing_format", named, "auto_round:auto_gptq, or auto_round:auto_awq of 4 bits,")


def _awq(settings: Mapping[str, Any]) -> Quantization:
    form = str(settings.get("version", "gemm")).lower()
    _one_of("awq", {"version": form}, "version", ("gemm",))
    name = "w_bit" if "w_bit" in settings else "bits"
    _one_of("awq", settings, name, (4,), 4)
    _one_of("awq", settings, "zero_point", (True,), True)
    name = "q_group_size" if "q_group_size" in settings else "group_size"
    return Quantization("awq", "awq", packing=AwqPacking(_group("awq", settings, name)))


INTEGERS = ("int-quantized", "naive-quantized")
FLOATS = ("float-quantized", "naive-quantized")
TENSORS_SAY = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4", "mxfp8-quantized": "fp8"}
"""The formats of compressed-tensors that have no settings."""


def _compressed_tensors(settings: Mapping[str, Any]) -> Quantization:
    """What compressed-tensors' config says (its `QuantizationConfig`). Raises CheckpointError."""
    method = "compressed-tensors"
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        raise _refused(method, "sparsity_config", sparse, "none")
    if settings.get("transform_config"):
        raise _refused(method, "transform_config", settings["transform_config"], "none")
    groups = settings.get("config_groups")
    described = [
        (group.get("format") or settings.get("format"), group["weights"])
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]
    if not described:
        raise CheckpointError(f"{method} says nothing of weights in config_groups; get the checkpoint again")
    found = {_compressed_tensors_group(form, weights) for form, weights in described}
    packings = {group.packing for group in found} - {None}
    blocks = {group.block for group in found if group.experts == "fp8"}
    if len(packings) > 1 or len(blocks) > 1:
        raise _refused(method, "config_groups", len(described), "groups with the same bits and group_size")
    if len(found) == 1:
        return found.pop()
    return Quantization(method, method, next(iter(blocks), None), next(iter(packings), None))


def _compressed_tensors_group(form: Any, weights: Mapping[str, Any]) -> Quantization:
    method = "compressed-tensors"
    known = ("pack-quantized", "int-quantized", *FLOATS, *TENSORS_SAY)
    form = _one_of(method, {"format": form}, "format", known)
    if form in TENSORS_SAY:
        return _stated(method, TENSORS_SAY[form], (1, mxfp4.BLOCK))
    if form == "pack-quantized":
        _one_of(method, weights, "type", ("int",), "int")
        bits = _one_of(method, weights, "num_bits", (4, 8))
        strategy = _one_of(method, weights, "strategy", ("group", "channel", "tensor"), "group")
        group = _group(method, weights) if strategy == "group" else -1
        packing = CompressedTensorsPacking(bits, group, zeros=weights.get("symmetric") is False)
        return Quantization(method, method, packing=packing)
    _one_of(method, weights, "num_bits", (8,))
    if form in INTEGERS and weights.get("type", "int") == "int":
        _one_of(method, weights, "strategy", ("tensor", "channel"), "tensor")
        return Quantization(method, method)
    _one_of(method, weights, "type", ("float",))
    strategy = _one_of(method, weights, "strategy", ("tensor", "channel", "block"))
    block: Any = weights.get("block_structure") if strategy == "block" else (1, WHOLE)
    if not _is_block(block):
        raise CheckpointError(f"block_structure {block!r} is not two numbers from 1 up")
    return _stated(method, "fp8", None if strategy == "tensor" else (int(block[0]), int(block[1])))


MODELOPT = {
    "FP8": ("fp8", None),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", (1, WHOLE)),
    "FP8_PB_WO": ("fp8", (fp8.BLOCK, fp8.BLOCK)),
    "MXFP8": ("fp8", (1, mxfp4.BLOCK)),
    "NVFP4": ("nvfp4", None),
    "W4A16_NVFP4": ("nvfp4", None),
    "W4A8_NVFP4_FP8": ("nvfp4", None),
    "W4A8_MXFP4_FP8": ("mxfp4", None),
}
"""NVIDIA Model Optimizer's names of what it does to weights and activations (`quant_algo`) -> the format of
the weights and, for FP8, rows and columns that share a scale."""


def _modelopt(settings: Mapping[str, Any]) -> Quantization:
    """What NVIDIA Model Optimizer's config says, in config.json or hf_quant_config.json. Raises
    CheckpointError."""
    algorithm = settings.get("quant_algo")
    layers = settings.get("quantized_layers") if algorithm == "MIXED_PRECISION" else {"": settings}
    if not isinstance(layers, Mapping) or not all(isinstance(layer, Mapping) for layer in layers.values()):
        raise _refused("modelopt", "quantized_layers", layers, "a description of each layer")
    found = set()
    for layer in layers.values():
        named = {"quant_algo": str(layer.get("quant_algo")).upper()}
        found.add(MODELOPT[_one_of("modelopt", named, "quant_algo", tuple(MODELOPT))])
    if len(found) == 1:
        return _stated("modelopt", *found.pop())
    blocks = {block for form, block in found if form == "fp8"}
    if len(blocks) > 1 or not found:
        raise _refused("modelopt", "quantized_layers", len(layers), "layers with the same blocks in FP8")
    return Quantization("modelopt", "modelopt", next(iter(blocks), None))


def _stated(method: str, form: str, block: tuple[int, int] | None) -> Quantization:
    """Weights of one format whose tensors say the rest."""
    return Quantization(method, form, block if form == "fp8" else None)


def _one_of(
    method: str, settings: Mapping[str, Any], name: str, known: tuple[Any, ...], default: Any = None
) -> Any:
    found = settings.get(name)
    found = default if found is None else found
    if isinstance(found, dict | list) or found not in known:
        raise _refused(method, name, found, " or ".join(map(str, known)))
    return found


def _group(method: str, settings: Mapping[str, Any], name: str = "group_size") -> int:
    found = settings.get(name)
    if type(found) is not int or (found < 1 and found != -1):
        raise _refused(method, name, found, "-1 or a number from 1 up")
    return found


def _refused(method: str, name: str, found: Any, known: str) -> CheckpointError:
    return CheckpointError(
        f"the weights are quantized by {method} with {name} {str(found)[:80]!r}, of which only "
        f"{known} is read; use the model's bf16 or fp16 checkpoint"
    )


def _settings(config: Any) -> Mapping[str, Any] | None:
    if not isinstance(config, Mapping):
        config = {name: getattr(config, name, None) for name in ("quantization_config", "text_config")}
        text = config["text_config"]
        if text is not None and not isinstance(text, Mapping):
            config["text_config"] = {"quantization_config": getattr(text, "quantization_config", None)}
    text = config.get("text_config") or {}
    found = config.get("quantization_config")
    found = found or (text.get("quantization_config") if isinstance(text, Mapping) else None)
    found = found or config.get("compression_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        to_dict = getattr(found, "to_dict", None)
        if to_dict is None:
            raise CheckpointError(f"what it says of quantization is {str(found)[:80]!r}, which has no fields")
        found = to_dict()
    return cast("Mapping[str, Any]", found)


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(isinstance(size, int) and size > 0 for size in block)
    )
