"""Qwen3-Next as GGUF: as Qwen3.5, but for its linear attention's matrices.

Runs in the peer's environment, as gguf_file.py, which writes the files; sources in gguf_architectures.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf_layer import Architecture, Config, Layer, Turn
from gguf_qwen35 import describe_sizes, layer_with, plus_one, value_heads
from gguf_tensor import Array, Tensor, floats


def _linear_attention(config: Config, layer: Layer) -> Iterator[Tensor]:
    """Checkpoints have each head of keys' queries, keys, values and gates together; llama.cpp has all
    queries, then all keys, then all values, and gates apart."""
    hidden, keys, values = config["hidden_size"], config["linear_num_key_heads"], value_heads(config)
    key_width, width = config["linear_key_head_dim"], config["linear_value_head_dim"]
    of_values = values // keys * width
    ends = np.cumsum([key_width, key_width, of_values])

    def parts(first: int, last: int) -> Turn:
        def turn(rows: Array) -> Array:
            split = np.split(rows.reshape(keys, -1, hidden), ends, axis=1)
            return np.concatenate([part.reshape(-1, hidden) for part in split[first:last]])

        return turn

    module, channels = "linear_attn", 2 * keys * key_width + values * width
    yield layer.matrix("attn_qkv", f"{module}.in_proj_qkvz", channels, hidden, turn=parts(0, 3))
    yield layer.matrix("attn_gate", f"{module}.in_proj_qkvz", values * width, hidden, turn=parts(3, 4))
    yield layer.matrix("ssm_ba", f"{module}.in_proj_ba", 2 * values, hidden)
    convolution, kernel = f"{module}.conv1d.weight", config["linear_conv_kernel_dim"]
    yield layer.exact("ssm_conv1d.weight", convolution, channels, kernel, turn=lambda rows: rows[:, 0])
    yield layer.exact("ssm_dt.bias", f"{module}.dt_bias", values)
    yield layer.exact("ssm_a", f"{module}.A_log", values, turn=lambda log: -np.exp(floats(log)))
    yield layer.exact("ssm_norm.weight", f"{module}.norm.weight", width)
    yield layer.matrix("ssm_out", f"{module}.out_proj", hidden, values * width)


QWEN3_NEXT = Architecture("qwen3next", layer_with(_linear_attention), describe_sizes, norm=plus_one)
