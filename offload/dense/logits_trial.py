"""Tests whether a model gives the same logits when a part of it is computed in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_local.cache.errors import first_line
from moe_local.offload.dense.prompt_attention import FEWEST_ROWS
from moe_local.offload.modeling.names import cache_name

TOKENS = FEWEST_ROWS
"""Tokens of the prompt that a model is tried with: as many as the library's attention takes of any heads."""

EXACT, ROUGH = 1e-4, 0.1
"""Allowed error of logits, relative to their norm, in fp32 and in 16-bit dtypes. Equally good rounding gave
0.02 after 61 layers in bf16; a wrong computation gives a large part of the norm."""


def difference(model: Any, change: Callable[[], None]) -> str | None:
    """Apply `change`; how the logits differ from those before, or the error raised; None if they agree.

    Compares the logits of a short prompt, of one with a gap in its mask, and of a token after a prompt. For a
    causal model of transformers whose experts return something.
    """
    with torch.no_grad():
        try:
            wanted = _logits(model)
            change()
            off = float((_logits(model) - wanted).norm() / wanted.norm())
        except Exception as error:  # a model or GPU may fail in any way
            return f"{type(error).__name__}: {first_line(error)}"
    allowed = EXACT if model.dtype == torch.float32 else ROUGH
    return (
        None if off <= allowed else f"logits were off by {off:.2g} of their norm, where {allowed} is allowed"
    )


def _logits(model: Any) -> torch.Tensor:
    """The logits of the three cases, [3, vocabulary] fp32."""
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(1, TOKENS + 1, device=model.device)[None] % config.vocab_size
    seen = torch.ones_like(ids)
    seen[:, 1] = 0  # not the first, which would then see nothing: kernels differ in that case
    memory = {cache_name(model.forward): DynamicCache(config=config), "use_cache": True}
    place = torch.full((1, 1), TOKENS, device=model.device)
    outputs = [
        model(input_ids=ids, **memory),
        model(input_ids=ids[:, -1:], position_ids=place, **memory),
        model(input_ids=ids, attention_mask=seen),
    ]
    return torch.cat([output.logits[:, -1].float() for output in outputs])
