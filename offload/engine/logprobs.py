"""Log probabilities of tokens in the model's own distribution, whatever method then picked the token.

Computed in one thread: for 151936 ids on two busy cores a token took 1.7 ms in one thread and 22 ms in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_local.offload.system.threads import one_torch_thread

SCORED_BYTES = 64 << 20
"""Most bytes of fp32 logits in one forward of a prompt whose own tokens are scored."""
PIECE = 32
"""Positions whose whole distributions are held at a time."""


class LogProbs(NamedTuple):
    """Natural logarithms of probabilities in the model's own distribution, for one position of a text."""

    logprob: float
    """Log probability of the token at this position."""
    top_logprobs: tuple[tuple[int, float], ...]
    """As many (id, log probability) as were asked for, likeliest first; of equal ones, the lower id first."""


@one_torch_thread()
def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The log probability of every id, fp32, in a new tensor, from the model's logits [..., vocabulary].

    To be called before processors get the logits, since some change them in place.
    """
    return torch.log_softmax(logits.float(), dim=-1)


@one_torch_thread()
def look_up(table: torch.Tensor, token: int, count: int) -> LogProbs:
    """The LogProbs of `token` with the `count` likeliest ids, from log probabilities [vocabulary].

    Waits for the device. Rounded logits are often equal. Which of equal ones topk returns is unspecified;
    argmax returns the lowest id, and so must this, or the greedy token might not be listed as the likeliest.
    """
    top: list[tuple[int, float]] = []
    if count:
        least = table.topk(min(count, len(table))).values[-1]
        ids = (table >= least).nonzero()[:, 0]
        pairs = zip(ids.tolist(), table[ids].tolist(), strict=True)
        top = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count]
    return LogProbs(float(table[token]), tuple(top))


def look_up_each(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[LogProbs]:
    """The LogProbs of `tokens`: the i-th one in the distribution of the i-th logits of [n, vocabulary]."""
    found: list[LogProbs] = []
    for at in range(0, len(tokens), PIECE):
        some = tokens[at : at + PIECE]
        tables = log_probabilities(logits[at : at + len(some)])
        found += [look_up(table, token, count) for table, token in zip(tables, some, strict=True)]
    return found


def scored_chunk(vocabulary: int) -> int:
    """How many tokens of a prompt whose tokens are scored go into one forward."""
    return max(2, SCORED_BYTES // (4 * vocabulary))
