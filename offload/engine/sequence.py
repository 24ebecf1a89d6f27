"""A sequence in the decode loop, and what one step makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch

from moe_local.offload.engine.logprobs import LogProbs
from moe_local.offload.engine.sampling import Settings


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """An end-of-sequence token, or a stop string."""
    LENGTH = "length"
    """max_new_tokens, max_time, or the end of the context."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and what follows it. The engine writes it; callers read."""

    ids: list[int]
    """The prompt, then the new tokens."""
    prompt_len: int
    settings: Settings
    row: int
    """Its row of the key-value memory. Changes when another sequence leaves."""
    finish_reason: FinishReason | None = None
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were taken over from other sequences."""
    shares: bool = False
    """Whether they may be."""
    deadline: float | None = None
    seen: torch.Tensor | None = field(default=None, repr=False)
    """`ids` on the model's device with room to grow, [1, capacity + 1], where processors want them."""
    prompt_logprobs: list[LogProbs] = field(default_factory=list, repr=False)
    """Of the prompt's tokens from the second on, as far as they are computed, where they are asked for."""

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_len :]


class Step(NamedTuple):
    """One new token. `finish_reason` is None while the sequence goes on."""

    sequence: Sequence
    token: int
    finish_reason: FinishReason | None
    logprobs: LogProbs | None = None
    """Where `settings.logprobs` asks for them."""


class Work(NamedTuple):
    """What one row contributes to a forward: its next ids, and whether they are the last that it has."""

    sequence: Sequence
    ids: list[int]
    samples: bool
    scored: bool
    """Whether logits of all of the ids are wanted, not only of the last."""
