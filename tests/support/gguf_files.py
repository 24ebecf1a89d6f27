"""GGUF files as benchmarks write them for llama.cpp, and the numbers in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from peers import gguf_file
from safetensors.torch import load_file


def written(checkpoint: Path, out: Path, kind: str) -> dict[str, Any]:
    """Write the checkpoint as GGUF; returns the file's tensors by name."""
    gguf_file.write(checkpoint, out, gguf.GGMLQuantizationType[kind])
    assert not out.with_suffix(".partial").exists()
    return {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {k: v.float() for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}


def values(tensor: Any) -> torch.Tensor:
    numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(numbers.copy()).reshape(tuple(int(n) for n in tensor.shape[::-1]))
