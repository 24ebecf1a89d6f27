"""What tests of decoder layers that the library computes have in common: how tokens go through a model, and
what may happen to a layer meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_local.offload.engine.batch_view import BatchMasks
from moe_local.offload.engine.kv_slab import probe_cache
from moe_local.offload.engine.memory import make_kv

IDS = [5, 17, 300, 42, 7, 99, 260, 31]
FORWARDS = len(IDS) + 1
"""Of `one_by_one`, which tries the model's cache out first."""


def layers_of(hf: Any) -> list[Any]:
    return list(hf.model.layers)


def apart(hf: Any) -> Any:
    """The model, whose layers are computed one by one from now on."""
    for layer in layers_of(hf):
        layer._token_layer.among = None
    return hf


def counted(model: Any) -> tuple[Any, ...]:
    stats = model.stats()
    return stats.routed.counts, stats.hits, stats.misses


def one_by_one(hf: Any, ids: list[int] = IDS, before: Callable[[int], None] | None = None) -> torch.Tensor:
    """Logits [T, V] of tokens that come one at a time; `before` each is called with its place."""
    kv = make_kv(hf, 1, 32, probe_cache(hf))
    kv.join()
    rows = []
    with torch.no_grad():
        for place, token in enumerate(ids):
            if before is not None:
                before(place)
            positions = torch.tensor([[place]])
            rows.append(hf(torch.tensor([[token]]), position_ids=positions, past_key_values=kv.row(0)).logits)
            kv.advance(0, 1)
    return torch.cat(rows)[:, 0]


@torch.no_grad()
def together(hf: Any, prompts: list[list[int]], new: int) -> list[torch.Tensor]:
    """Logits [new, V] of the last `new` ids of each prompt, which come together, one of each at a time; those
    before come one by one."""
    kv = make_kv(hf, len(prompts), 32, probe_cache(hf))
    for row, prompt in enumerate(prompts):
        kv.join()
        for place, token in enumerate(prompt[:-new]):
            hf(torch.tensor([[token]]), position_ids=torch.tensor([[place]]), past_key_values=kv.row(row))
            kv.advance(row, 1)
    masks, rows = BatchMasks(hf, kv.windows), []
    for step in range(new):
        tokens = torch.tensor([[prompt[step - new]] for prompt in prompts])
        cache = kv.batch(len(prompts))
        mask, positions = masks.make(kv.places), kv.places.columns[:, None]
        output = hf(tokens, position_ids=positions, attention_mask=mask, past_key_values=cache)
        rows.append(output.logits[:, -1])
        for row in range(len(prompts)):
            kv.advance(row, 1)
    return list(torch.stack(rows, 1))


class Loop:
    """A caller's own forward through layers, a token at a time."""

    def __init__(self, hf: Any) -> None:
        self.hf, self.layers = hf, layers_of(hf)
        self.kv = make_kv(hf, 1, 32, probe_cache(hf))
        self.kv.join()

    def kwargs(self, place: int) -> dict[str, Any]:
        angles = self.hf.model.rotary_emb(torch.zeros(1, 1, 64), torch.tensor([[place]]))
        return {"position_embeddings": angles, "past_key_values": self.kv.row(0), "attention_mask": None}

    def __call__(
        self,
        order: list[int],
        before: Callable[[int, torch.Tensor], Any] = lambda number, x: None,
        more: dict[int, dict[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Outputs of four tokens; `before` each layer it is called with its number and its input. `more`:
        arguments of some layers, besides those of all."""
        outputs, random = [], torch.Generator().manual_seed(0)
        with torch.no_grad():
            for place in range(4):
                x = torch.randn(1, 1, 64, generator=random)
                kwargs = self.kwargs(place)
                for number in order:
                    before(number, x)
                    x = self.layers[number](x, **kwargs | (more or {}).get(number, {}))
                outputs.append(x.clone())
                self.kv.advance(0, 1)
        return torch.cat(outputs)


PARTS = ["", "self_attn", "mlp", "mlp.gate", "mlp.experts", "input_layernorm", "post_attention_layernorm"]


def moved(layer: Any, hf: Any) -> None:
    for name, weight in layer.named_parameters():
        if "experts" not in name:
            weight.data = weight.data * 1.5


def own_attention(layer: Any, hf: Any) -> None:
    cls: Any = type(layer.self_attn).__mro__[1]  # transformers'
    made = cls(hf.config, layer.self_attn.layer_idx).eval().requires_grad_(False)
    layer.self_attn = made.to(layer.self_attn.q_proj.weight.dtype)


def own_norm(layer: Any, hf: Any) -> None:
    layer.post_attention_layernorm = nn.RMSNorm(64, dtype=layer.post_attention_layernorm.weight.dtype)


def own_block(layer: Any, hf: Any) -> None:
    cls: Any = type(layer.mlp.gate).__mro__[1]
    made = cls(hf.config).requires_grad_(False)
    made.weight.copy_(layer.mlp.gate.weight.flip(0))
    layer.mlp.gate = made.to(layer.mlp.gate.weight.dtype)


def own_forward(layer: Any, hf: Any) -> None:
    norm = layer.input_layernorm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def other_numbers(layer: Any, hf: Any) -> None:
    """Where they lie: as memory that is freed and given out again."""
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.view(torch.int32)


BETWEEN: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "weights move": (moved, 3),
    "another attention": (own_attention, 2),
    "another norm": (own_norm, 2),
    "another router": (own_block, 3),
    "a norm's numbers": (other_numbers, 2),
    "a forward in a norm's place": (own_forward, 2),
    "a module that nobody calls": (lambda layer, hf: layer.add_module("extra", nn.Linear(2, 2)), 3),
    "a part in training": (lambda layer, hf: layer.self_attn.train(), 2),
    "a router in training": (lambda layer, hf: layer.mlp.gate.train(), 3),
    "a router's top_k": (lambda layer, hf: setattr(layer.mlp.gate, "top_k", 1), 3),
    "attention that gives scores": (lambda layer, hf: hf.set_attn_implementation("eager"), 0),
}
"""What is done to the second layer between two tokens, and how many layers are the library's afterwards."""
