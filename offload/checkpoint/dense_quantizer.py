"""A quantization method for transformers' loader that quantizes linear layers to QuantizedLinear on the CPU.

The loader converts each weight to the form that the model needs, then has this method quantize it before it
reads the next. Imports transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_local.cache.errors import CheckpointError
from moe_local.offload.dense.linear import QuantizedLinear

METHOD = "moe_local"


@register_quantization_config(METHOD)
class DenseConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """For `from_pretrained(quantization_config=...)`: the weights, and QuantizedLinear's options for them."""

    def __init__(self, weights: Iterable[str], format: str, activations: str) -> None:
        self.quant_method = METHOD
        self.weights = list(weights)
        self.format = format
        self.activations = activations

    def to_dict(self) -> dict[str, Any]:
        """The fields that the model's config shows."""
        return {"quant_method": METHOD, "format": self.format, "activations": self.activations}


@register_quantizer(METHOD)
class DenseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces each linear layer that its config names with a QuantizedLinear.

    The loader would catch errors and replace them with its own, so they are kept here.
    """

    def __init__(self, quantization_config: DenseConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.mismatched: list[tuple[str, torch.Size, tuple[int, ...]]] = []
        """Name, shape found and shape wanted of weights that do not fit their layers."""
        self.refused: list[CheckpointError] = []
        """Weights that could not be quantized."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        for name in config.weights:
            path = name.removesuffix(".weight")
            original = model.get_submodule(path)
            model.set_submodule(path, QuantizedLinear(original, config.format, config.activations))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), QuantizedLinear)

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Quantize(ConversionOps):  # type: ignore[misc]
    """The loader's operation that quantizes a parameter of a QuantizedLinear."""

    def __init__(self, quantizer: DenseQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for full_name, values in input_dict.items():
            tensor: torch.Tensor = values[0] if isinstance(values, list) else values
            path, _dot, name = full_name.rpartition(".")
            layer: QuantizedLinear = model.get_submodule(path)
            wanted = (layer.out_features, layer.in_features)[: 1 if name == "bias" else 2]
            if tuple(tensor.shape) != wanted:
                self._quantizer.mismatched.append((full_name, tensor.shape, wanted))
                continue
            try:
                made[full_name] = layer.quantized(name, tensor)
            except CheckpointError as error:
                self._quantizer.refused.append(CheckpointError(f"{path}: {error}"))
        return made
