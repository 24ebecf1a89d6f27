"""The demo's network: a Mixtral of seven million parameters, made to train quickly on a CPU."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_local.demo.tokenizer import BOS, END, PAD, VOCABULARY

EXPERTS, TOP_K, LAYERS = 8, 2, 5


def build_model(seed: int) -> MixtralForCausalLM:
    """A freshly initialized fp32 model."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                weight.mul_(1 / math.sqrt(2 * LAYERS))  # keeps the residual's variance flat over depth
            if name.endswith("gate.weight"):
                weight.normal_(0, 0.05)
    return model


def grouped_experts(self: MixtralExperts, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """`MixtralExperts.forward` with one matrix product per expert over its own tokens.

    `hidden` is (T, D), `chosen` and `weights` are (T, top-k); returns (T, D).  Indexing the stacked weights
    would make autograd fill a zero gradient of all experts for each of them; `unbind` does not.
    """
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    token = torch.div(order, chosen.shape[-1], rounding_mode="floor")
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()
    parts = []
    for rows, gate_up, down in zip(
        hidden.index_select(0, token).split(counts),
        self.gate_up_proj.unbind(0),
        self.down_proj.unbind(0),
        strict=True,
    ):
        gate, up = functional.linear(rows, gate_up).chunk(2, -1)
        parts.append(functional.linear(functional.silu(gate) * up, down))
    scaled = torch.cat(parts) * weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    return torch.zeros_like(hidden).index_add(0, token, scaled)


class RouterLosses:
    """Collects each layer's router outputs in a forward pass and scores their balance.

    transformers' own loss adds up the layers first, so that layers may be unbalanced in opposite directions;
    here every layer is balanced by itself.
    """

    def __init__(self, model: MixtralForCausalLM) -> None:
        self._seen: list[tuple[Tensor, Tensor]] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._record)

    def _record(self, _gate: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._seen.append((output[0], output[2]))  # scores (T, E) before the softmax, chosen (T, top-k)

    def take(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """(balance, z) losses of the pass just run, means over layers; `real` (T,) is 0 for padding.

        Balance is E/top-k times the sum over experts of token share times mean probability, 1 when even.
        """
        tokens = real.sum()
        balance = torch.zeros(())
        z = torch.zeros(())
        for scores, chosen in self._seen:
            share = (functional.one_hot(chosen, EXPERTS).sum(1) * real[:, None]).sum(0) / tokens
            probability = (scores.softmax(-1) * real[:, None]).sum(0) / tokens
            balance = balance + EXPERTS / TOP_K * (share * probability).sum()
            z = z + (scores.logsumexp(-1).square() * real).sum() / tokens
        layers = len(self._seen)
        self._seen.clear()
        return balance / layers, z / layers


def save_model(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a bf16 Hub folder; files appear by rename, so a reader never sees half a one."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
    try:
        half = MixtralForCausalLM(model.config)
        half.load_state_dict(model.state_dict())
        half.to(torch.bfloat16)
        half.generation_config = GenerationConfig(
            do_sample=False, bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD, max_new_tokens=128
        )
        half.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for file in sorted(staging.iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staging)
