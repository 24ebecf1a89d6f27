"""How a checkpoint's publisher quantized its weights, by its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize import fp8

METHODS = ("fp8", "mxfp4")
"""transformers' names of what can be read."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """`method` is "fp8" (DeepSeek's, in blocks) or "mxfp4" (gpt-oss's, experts only)."""

    method: str
    block: tuple[int, int] | None
    """Rows and columns that share a scale in FP8; None: each tensor has one scale."""
    experts: str
    """Format of the routed experts: "fp8" or "mxfp4"."""

    @classmethod
    def of(cls, config: Any) -> Quantization | None:
        """From transformers' config or the fields of a config.json; None if nothing is quantized.

        How activations were scaled when the model was trained does not matter here and is passed over.
        Raises CheckpointError, in half a line, for methods that are not read and settings that make no sense.
        """
        settings = _settings(config)
        if settings is None:
            return None
        method = str(settings.get("quant_method", "unknown"))
        if method not in METHODS:
            raise CheckpointError(
                f"the weights are already quantized ({method}), and of such formats only "
                f"{' and '.join(METHODS)} are read; use the model's bf16 or fp16 checkpoint"
            )
        if method == "mxfp4":
            return cls(method, None, "mxfp4")
        block = settings.get("weight_block_size", (fp8.BLOCK, fp8.BLOCK))
        if block is not None and not _is_block(block):
            raise CheckpointError(f"weight_block_size {block!r} is not two numbers from 1 up")
        experts = "mxfp4" if settings.get("expert_dtype") == "fp4" else "fp8"
        return cls(method, None if block is None else (block[0], block[1]), experts)


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
