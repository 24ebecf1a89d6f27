"""Attention masks as transformers asks for them, in other forms than it makes by itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def use_capturable_mask(hf: Any) -> None:
    """Let transformers make the masks of a model with eager attention by `eager_mask`: the same numbers.

    Its releases up to 5.20 copy a zero from the host for them, which no CUDA graph can capture. Registered
    for the whole process, since models look masks up by the name of their attention, which some of them
    compare with "eager".
    """
    if hf.config.get_text_config(decoder=True)._attn_implementation == "eager":
        AttentionMaskInterface.register("eager", eager_mask)


def eager_mask(*, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor | None:
    """What is added to scores [batch, 1, queries, keys]: 0 where a key is seen, the least number elsewhere.

    `options` are those of transformers' `sdpa_mask`, which says what is seen. None: everything is.
    """
    seen = sdpa_mask(**options | {"allow_is_causal_skip": False})
    return None if seen is None else _added(seen, dtype)


def single_query_mask(*, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor | None:
    """As transformers' `sdpa_mask`, bool; for one query what is added to its scores, as `eager_mask`.

    That is what fused kernels take: from booleans every layer would make it anew.
    """
    seen = sdpa_mask(**options)
    return seen if seen is None or seen.shape[2] != 1 else _added(seen, dtype)


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)
