"""What differs between families of models in GGUF: configs, names, converted numbers, and tokenizers.

Names, metadata and conversions are those of llama.cpp's converter (conversion/ in its repository).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from moe_local.offload.checkpoint.gguf_description import Description, Fields

Undo = Callable[[torch.Tensor], torch.Tensor]
"""Undoes what the converter did to a weight. May return a view, and works on the meta device, too."""

SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers for what routers do with their scores."""


class Join(NamedTuple):
    """One weight of the model that the converter took apart."""

    parts: tuple[str, ...]
    """Names of a layer's tensors."""
    join: Callable[..., torch.Tensor]
    """Puts them together; works on the meta device, too."""


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture of GGUF becomes a model of transformers."""

    name: str
    """For users."""
    fields: Callable[[Description], Fields]
    """The fields of its config.json that differ from or are not among the ones that all families share."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of a layer's tensors, those that other families do not have or call otherwise: with their ending
    ("ssm_dt.bias") -> the model's parameter, or without ("ffn_norm") -> its module."""
    undo: Callable[[Any], Mapping[str, Undo]] = lambda _: {}
    """From the model's config, for tensors whose numbers were converted: name without ending -> Undo."""
    joins: Callable[[Any], Mapping[str, Join]] = lambda _: {}
    """From the model's config, for weights that the converter took apart: the model's parameter -> Join."""
    split: str = ""
    """How text is split before tokens are merged, for files that do not say it; see `gguf_tokenizer`."""
