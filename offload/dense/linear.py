"""Linear layers of the dense part on the CPU, computed in place from plain or quantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_local.offload.kernels.cpu import matrix_at, multiply, plain_matrix, rounding, serves
from moe_local.offload.native.library import DTYPES, FLOATS, PLAIN, Matrix, library
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec
from moe_local.offload.quantize.views import check_finite

FEW_TOKENS = 4
"""Up to so many tokens the library reads a plain weight at the memory's speed; for more, torch is faster."""


def use_native_linears(model: nn.Module) -> None:
    """Let the library compute the plain linear layers of `model` in CPU memory, for few tokens at a time."""
    if library() is None:
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype in PLAIN:
            module.__class__ = NativeLinear


class NativeLinear(nn.Linear):
    """An nn.Linear that the library computes for few tokens of the weight's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        weight = self.weight
        if (
            not 0 < x.numel() <= FEW_TOKENS * self.in_features
            or x.dtype is not weight.dtype
            or x.dtype not in PLAIN
            or x.device.type != "cpu"
            or not weight.is_contiguous()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        y = multiply(plain_matrix(weight, self.bias), x.reshape(-1, x.shape[-1]), FLOATS)
        return y.view(*x.shape[:-1], self.out_features)


class QuantizedLinear(nn.Module):
    """An nn.Linear whose weight is stored as an expert's matrix is: a flat uint8 buffer in a codec's layout.

    For CPU memory. The C++ library multiplies in place, with as many threads as torch is set to. Without the
    library, under autocast, and where gradients with respect to the input are needed, the whole weight is
    dequantized and torch multiplies.
    """

    weight: nn.Parameter
    """uint8 [layout.nbytes] once it is `quantized`; until then the original layer's weight."""
    bias: nn.Parameter | None
    """float32 [out_features]; until quantized, the original layer's bias."""

    def __init__(self, original: nn.Linear, format: str, activations: str = "native") -> None:
        """Replaces `original`, which may be on the meta device, and takes over its parameters.

        `format` and `activations` as in `load()`: "nf4" or "int8", "native" or "int8".
        """
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.activations = activations
        self.layout = codec_for(format).layout([TensorSpec("weight", (self.out_features, self.in_features))])
        self.weight = nn.Parameter(original.weight.detach(), requires_grad=False)
        self.register_parameter("bias", original.bias)
        self._matrix: tuple[tuple[int, int | None], Matrix] | None = None

    def quantized(self, name: str, values: torch.Tensor) -> nn.Parameter:
        """The parameter `name`, "weight" or "bias", made from values of the original parameter's shape.

        Raises CheckpointError for values that the format cannot hold.
        """
        if name == "bias":
            made = values.detach().to(torch.float32, copy=True).contiguous()
            check_finite(name, made)
        else:
            made = torch.empty(self.layout.nbytes, dtype=torch.uint8)
            codec_for(self.layout.format).encode({name: values.detach()}, self.layout, made)
        return nn.Parameter(made, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features], in the dtype of x."""
        if not serves(self.layout, x) or (torch.is_grad_enabled() and x.requires_grad):
            return self._decoded(x)
        y = multiply(self.in_place(), x.reshape(-1, self.in_features), rounding(self.activations, x.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def in_place(self) -> Matrix:
        """The library's descriptor of the weight and bias at their current addresses."""
        bias = None if self.bias is None else self.bias.data_ptr()
        where = self.weight.data_ptr(), bias
        if self._matrix is None or self._matrix[0] != where:
            matrix = matrix_at(where[0], self.layout, "weight", has_bias=False)
            matrix.bias = bias
            self._matrix = where, matrix
        return self._matrix[1]

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, [out_features, in_features], in a new tensor."""
        read = dtype if dtype in DTYPES else torch.float32
        return codec_for(self.layout.format).decode(self.weight, self.layout, read)["weight"].to(dtype)

    def _decoded(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.decoded(x.dtype), bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, format={self.layout.format}"

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy."""
        return {**self.__dict__, "_matrix": None}
