"""Functions for transformers' mask interface that make masks in other forms than its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def use_capturable_mask(hf: Any) -> None:
    """Let transformers use `eager_mask`, with the same numbers, for a model with eager attention.

    transformers' own function, up to release 5.20, copies a zero from the host, which no CUDA graph can
    capture. Registered for the whole process as "eager": models look masks up by the name of their attention,
    and some of them compare that name with "eager".
    """
    if hf.config.get_text_config(decoder=True)._attn_implementation == "eager":
        AttentionMaskInterface.register("eager", eager_mask)


def eager_mask(*, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor | None:
    """The mask to add to scores, [batch, 1, queries, keys]: 0 where a key is seen, else the dtype's minimum.

    `options` are those of transformers' `sdpa_mask`, which decides what is seen. None: every key is.
    """
    seen = sdpa_mask(**options | {"allow_is_causal_skip": False})
    return None if seen is None else _added(seen, dtype)


def single_query_mask(*, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor | None:
    """For several queries the bool mask of transformers' `sdpa_mask`; for one query, a mask to add to scores.

    Fused kernels take the latter; from booleans, every layer would have to make it again.
    """
    seen = sdpa_mask(**options)
    return seen if seen is None or seen.shape[2] != 1 else _added(seen, dtype)


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)
