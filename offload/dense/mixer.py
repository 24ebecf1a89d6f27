"""The part of a decoder layer in which tokens meet: attention of one kind or another, or linear attention."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from moe_local.offload.dense.attention_call import AttentionCall
from moe_local.offload.dense.token_delta_net import TokenDeltaNet
from moe_local.offload.native.library import Attention, DeltaNet, LatentAttention, Layer, Norm

Mixer = AttentionCall | TokenDeltaNet

_FIELDS: dict[type, str] = {
    Attention: "attention",
    LatentAttention: "latent_attention",
    DeltaNet: "delta_net",
}
"""The name of each kind's field of a Layer."""


def mixer_of(module: Any) -> Mixer | None:
    """The library's call for a module that mixes tokens; None for others."""
    own = vars(module)
    found = own.get("_token_attention", own.get("_token_state_call"))
    return found if isinstance(found, AttentionCall | TokenDeltaNet) else None


def layer_with(mixer: Mixer, before: Norm, behind: Norm) -> Layer:
    """The library's description of a layer with a mixer that is ready, and norms before it and behind it."""
    struct = mixer.struct
    return Layer(
        **{_FIELDS[type(struct)]: ctypes.pointer(struct)},
        before_attention=before,
        before_feed_forward=behind,
    )


def angles_of(
    mixer: Mixer, kwargs: dict[str, Any], tokens: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The cos and sin that the library reads for so many tokens, of a call that has places; None if it takes
    none."""
    return mixer.read_angles(kwargs, tokens) if isinstance(mixer, AttentionCall) else (None, None)
