"""How likely the model itself held a token to be, whatever it was then picked by.

In one thread: on two busy cores, of 151936 ids, a token's took 1.7 ms in one thread and 22 ms in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_local.offload.system.threads import one_torch_thread

SCORED_BYTES = 64 << 20
"""Most logits, in fp32, of one forward of a prompt whose own tokens are looked up."""
PIECE = 32
"""Places whose whole distributions are held at a time."""


class LogProbs(NamedTuple):
    """Natural logarithms of probabilities in the model's own distribution, for one place of a text."""

    logprob: float
    """Of the token that stands there."""
    top_logprobs: tuple[tuple[int, float], ...]
    """The likeliest ids with theirs, best first, of equals the lower id: as many as were asked for."""


@one_torch_thread()
def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of every id, fp32, in a tensor of its own, from logits [..., vocabulary] as the model computed them.

    To be called before processors see the logits: some change them in place.
    """
    return torch.log_softmax(logits.float(), dim=-1)


@one_torch_thread()
def look_up(table: torch.Tensor, token: int, count: int) -> LogProbs:
    """Those of `token` and of the `count` likeliest, from log probabilities [vocabulary].

    Waits for the device. Rounded logits are often equal. Which of equals topk takes is its own choice; argmax
    takes the lowest, and so must this, or the greedy token would not be the likeliest one.
    """
    top: list[tuple[int, float]] = []
    if count:
        least = table.topk(min(count, len(table))).values[-1]
        ids = (table >= least).nonzero()[:, 0]
        pairs = zip(ids.tolist(), table[ids].tolist(), strict=True)
        top = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count]
    return LogProbs(float(table[token]), tuple(top))


def look_up_each(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[LogProbs]:
    """Those of each of `tokens`, which follow the places of the first logits of [n, vocabulary]."""
    found: list[LogProbs] = []
    for at in range(0, len(tokens), PIECE):
        some = tokens[at : at + PIECE]
        tables = log_probabilities(logits[at : at + len(some)])
        found += [look_up(table, token, count) for table, token in zip(tables, some, strict=True)]
    return found


def scored_chunk(vocabulary: int) -> int:
    """How many tokens of such a prompt go into one forward."""
    return max(2, SCORED_BYTES // (4 * vocabulary))
