"""The records of the decode loop: a sequence, its part in a forward, and a step's new token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch

from moe_local.cache.errors import MoeLocalError
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
    """One prompt and the tokens that follow it. Written by the engine; callers only read it."""

    ids: list[int]
    """The prompt, then the new tokens."""
    prompt_len: int
    settings: Settings
    row: int
    """Its row of the key-value memory. Changes when another sequence leaves."""
    finish_reason: FinishReason | None = None
    departure: int | None = None
    """Its number among the sequences that have left; None while it takes part in steps."""
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were reused from other sequences."""
    shares: bool = False
    """Whether keys and values of other sequences may be reused."""
    parts_at: int = 0
    """How many of its first tokens some other sequence had in common with it when it joined."""
    deadline: float | None = None
    seen: torch.Tensor | None = field(default=None, repr=False)
    """`ids` on the model's device with room to grow, [1, capacity + 1], if processors need them."""
    prompt_logprobs: list[LogProbs] = field(default_factory=list, repr=False)
    """LogProbs of the prompt's tokens from the second on, as far as computed, if asked for."""

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_len :]


class SequenceError(MoeLocalError):
    """A step failed because of one of its sequences, which has to leave; the others can go on."""

    def __init__(self, message: str, sequence: Sequence) -> None:
        super().__init__(message)
        self.sequence = sequence


class Step(NamedTuple):
    """One new token. `finish_reason` is None while the sequence goes on."""

    sequence: Sequence
    token: int
    finish_reason: FinishReason | None
    logprobs: LogProbs | None = None
    """Given if `settings.logprobs` asks for them."""


class Work(NamedTuple):
    """One row's part in a forward: its next ids, and what is to be done with their logits."""

    sequence: Sequence
    ids: list[int]
    samples: bool
    """Whether these are the row's last ids, so that a token is sampled after them."""
    scored: bool
    """Whether logits of all of the ids are needed, not only of the last."""
