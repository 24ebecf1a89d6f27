"""Assigns a model's modules to several GPUs, as a `device_map` of accelerate and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe_local.offload.checkpoint.spec import experts_modules, layer_number


def device_map(model: Any, ends: Sequence[int], devices: Sequence[torch.device]) -> dict[str, str]:
    """Module path -> device, decoder layers [ends[i - 1], ends[i]) going to `devices[i]`.

    `model` may be on the meta device. Modules before the layers go to the first card and modules after them
    to the last. However, an output head that shares the embeddings' weights goes with them, and modules
    without weights (rotary embeddings) go to the first card, where the input is.
    """
    first, last = str(devices[0]), str(devices[-1])
    name, _ = next(experts_modules(model))
    number = layer_number(name)
    assert number is not None, f"{name} is in no numbered layer"
    path = name.partition(f".{number}.")[0].split(".")
    shared = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    found: dict[str, str] = {}
    parent: nn.Module = model
    for depth, step in enumerate(path):
        device = first
        for child, module in parent.named_children():
            if child == step:
                device = last
                continue
            parameters = list(module.parameters())
            stays = not parameters or any(id(parameter) in shared for parameter in parameters)
            found[".".join([*path[:depth], child])] = first if stays else device
        parent = parent.get_submodule(step)
    for index, _ in enumerate(parent.children()):
        card = next(card for card, end in enumerate(ends) if index < end)
        found[".".join([*path, str(index)])] = str(devices[card])
    return found
