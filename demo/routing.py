"""How the demo model routes: load, prediction of the next layer, and what a small LRU cache would hit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer


@dataclass(frozen=True, slots=True)
class Routing:
    """Figures over some texts, a list entry for each layer.

    `load` is each expert's share of the tokens' choices; `reuse` the share of a token's experts that the
    token before it used too.  `recall_early` and `recall_late` are the share of a layer's experts that its
    own norm and router predict from the layer before: from the residual before that layer's experts ran,
    and after (entry 0 is 0).  `lru_hits` maps slots to hit rates, each text from an empty cache.
    """

    load: list[list[float]]
    reuse: list[float]
    recall_early: list[float]
    recall_late: list[float]
    lru_hits: dict[str, list[float]]


class _Recorder:
    """Keeps each layer's chosen experts and its residual before and after them, of the last pass."""

    def __init__(self, model: MixtralForCausalLM) -> None:
        layers = model.model.layers
        self.chosen: list[Tensor] = [torch.empty(0)] * len(layers)  # (T, top-k) each
        self.before: list[Tensor] = list(self.chosen)  # (T, D) each
        self.after: list[Tensor] = list(self.chosen)  # (T, D) each
        self._handles = []
        for at, layer in enumerate(layers):
            self._handles += [
                layer.mlp.gate.register_forward_hook(self._keep_chosen(at)),
                layer.post_attention_layernorm.register_forward_pre_hook(self._keep_before(at)),
                layer.register_forward_hook(self._keep_after(at)),
            ]

    def close(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _keep_chosen(self, at: int):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            self.chosen[at] = output[2]

        return hook

    def _keep_before(self, at: int):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            self.before[at] = inputs[0][0]

        return hook

    def _keep_after(self, at: int):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor]) -> None:
            self.after[at] = output[0][0] if isinstance(output, tuple) else output[0]

        return hook


def measure_routing(
    model: MixtralForCausalLM, texts: list[list[int]], slots: tuple[int, ...] = (2, 3, 4)
) -> Routing:
    """Runs every text (token ids) through the model once and counts."""
    layers = model.model.layers
    depth, experts = len(layers), model.config.num_local_experts
    load = torch.zeros(depth, experts)
    reuse, early, late = torch.zeros(depth), torch.zeros(depth), torch.zeros(depth)
    hits = {count: [0] * depth for count in slots}
    choices = pairs = 0
    recorder = _Recorder(model)
    try:
        for text in texts:
            with torch.inference_mode():
                model(input_ids=torch.tensor([text]), use_cache=False)
            chosen, before, after = list(recorder.chosen), list(recorder.before), list(recorder.after)
            choices += chosen[0].numel()
            pairs += chosen[0][1:].numel()
            for at in range(depth):
                load[at] += torch.bincount(chosen[at].flatten(), minlength=experts)
                reuse[at] += _common(chosen[at][1:], chosen[at][:-1])
                for count in slots:
                    hits[count][at] += lru_hits(chosen[at].tolist(), count)
                if at:
                    early[at] += _common(chosen[at], _predict(layers[at], before[at - 1]))
                    late[at] += _common(chosen[at], _predict(layers[at], after[at - 1]))
    finally:
        recorder.close()
    return Routing(
        load=[[round(x, 3) for x in row] for row in (load / choices).tolist()],
        reuse=_rounded(reuse / pairs),
        recall_early=_rounded(early / choices),
        recall_late=_rounded(late / choices),
        lru_hits={str(count): [round(h / choices, 3) for h in row] for count, row in hits.items()},
    )


def lru_hits(steps: list[list[int]], slots: int) -> int:
    """Hits of an LRU cache of `slots` experts: a step's experts are looked up together, then admitted."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for step in steps:
        hits += sum(expert in cache for expert in step)
        for expert in step:
            cache.pop(expert, None)
            cache[expert] = None
        while len(cache) > slots:
            cache.popitem(last=False)
    return hits


def _predict(layer: MixtralDecoderLayer, hidden: Tensor) -> Tensor:
    with torch.inference_mode():
        chosen: Tensor = layer.mlp.gate(layer.post_attention_layernorm(hidden))[2]
    return chosen


def _common(one: Tensor, other: Tensor) -> float:
    """How many entries of `one` (T, k) occur in the same row of `other` (T, k)."""
    return float((one[:, :, None] == other[:, None, :]).any(-1).sum())


def _rounded(values: Tensor) -> list[float]:
    return [round(x, 3) for x in values.tolist()]
