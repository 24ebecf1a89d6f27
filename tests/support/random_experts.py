"""A model that consists only of seeded random experts, to test conversion without a checkpoint."""

from __future__ import annotations

import time
import weakref

import torch
from transformers import AutoConfig

from moe_local.offload.checkpoint.spec import ModelSpec, MoELayer, model_spec


def random_spec(
    layers: int, experts: int, hidden: int = 64, inner: int = 96, biases: bool = False
) -> ModelSpec:
    """The spec of a Mixtral of this size or, with `biases`, of a gpt-oss."""
    config = AutoConfig.for_model(
        "gpt_oss" if biases else "mixtral",
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_local_experts=experts,
    )
    return model_spec(config)


class RandomExperts:
    """An ExpertSource in memory. Records which experts are read, and can be slow or fail at one expert."""

    def __init__(
        self, layers: int = 3, experts: int = 4, *, seed: int = 0, spec: ModelSpec | None = None
    ) -> None:
        self.name = "tiny/Random-Experts"
        self.spec = spec or random_spec(layers, experts)
        self.fingerprint = f"{seed:032x}"
        self.seed = seed
        self.reads: list[tuple[int, int]] = []
        self.delay_s = 0.0
        self.fail_at: tuple[int, int] | None = None
        self.failure: BaseException = KeyboardInterrupt()
        self.most_alive = 0
        """Largest number of earlier experts whose tensors were still held when another was read."""
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def read_expert(self, layer: MoELayer, expert: int, memory: object = None) -> dict[str, torch.Tensor]:
        if (layer.index, expert) == self.fail_at:
            raise self.failure
        time.sleep(self.delay_s)
        self.reads.append((layer.index, expert))
        alive = sum(tensor() is not None for tensor in self._alive)
        self.most_alive = max(self.most_alive, alive)
        weights = self.weights(layer, expert)
        self._alive.append(weakref.ref(weights[layer.tensors[0].name]))
        return weights

    def weights(self, layer: MoELayer, expert: int) -> dict[str, torch.Tensor]:
        """The expert's tensors, bf16; the same at each call."""
        generator = torch.Generator().manual_seed(1_000_000 * self.seed + 1000 * layer.index + expert)
        return {
            tensor.name: (torch.randn(tensor.shape, generator=generator) * 0.05).bfloat16()
            for tensor in layer.tensors
        }
