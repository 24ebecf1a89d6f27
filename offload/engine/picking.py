"""Picks the next token of each sequence from its logits, according to its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moe_local.cache.errors import MoeLocalError, first_line
from moe_local.offload.engine.logprobs import LogProbs, log_probabilities, look_up, look_up_each
from moe_local.offload.engine.sampling import draw
from moe_local.offload.engine.sequence import Sequence, SequenceError, Work
from moe_local.offload.gpu.relief import shortage

BROKEN, MASKED = 1, 2
"""Faults of a pick: the model computed a NaN; no token is left that processors allow."""


class Pick(NamedTuple):
    """A token, with its log probabilities if they were asked for."""

    token: int
    logprobs: LogProbs | None


@contextmanager
def draws_undone(work: Ids[Work]) -> Iterator[None]:
    """Where the body raises, the sequences' own generators are as they were before, so that a step that is
    run again draws the same tokens. torch's global generator, which others use too, is left alone."""
    all_settings = [
        item.sequence.settings for item in work if item.samples and item.sequence.settings.do_sample
    ]
    generators = [settings.generator for settings in all_settings if settings.generator is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        raise


@contextmanager
def blamed_on(sequence: Sequence) -> Iterator[None]:
    """Turn what a sequence's options raise, but for a lack of memory, into a SequenceError of one line."""
    try:
        yield
    except Exception as error:
        if shortage(error) is not None:
            raise
        ours = isinstance(error, MoeLocalError)
        what = str(error) if ours else f"the options of this answer cannot be applied: {first_line(error)}"
        raise SequenceError(what, sequence) from error


def pick_tokens(
    rows: Ids[tuple[Sequence, torch.Tensor]], seen: Callable[[Sequence], torch.Tensor]
) -> list[Pick]:
    """One Pick per sequence, from its logits [1, vocabulary] fp32, with one host sync for all of them.

    `seen`: gives a sequence's ids on the device, [1, length], for processors. Raises MoeLocalError for NaN,
    SequenceError where processors leave no token and for what they raise.
    """
    if not rows:
        return []
    picked, tables = [], []
    for sequence, logits in rows:
        asked = sequence.settings.logprobs is not None
        tables.append(log_probabilities(logits[0]) if asked else None)
        picked.append(_pick(sequence, logits, seen))
    picks = []
    for (sequence, _), table, (token, fault) in zip(rows, tables, torch.stack(picked).tolist(), strict=True):
        if fault & BROKEN:
            raise MoeLocalError(
                f"the model computed NaN at position {len(sequence.ids) - 1}: a weight is damaged "
                "or too large for its dtype; convert the checkpoint again, or try --dense bf16"
            )
        if fault:
            raise SequenceError(
                f"the options of this answer leave no token to choose at position {len(sequence.ids)}; leave "
                "out some of those that forbid tokens (suppress_tokens, bad_words_ids, grammar, ...)",
                sequence,
            )
        count = sequence.settings.logprobs or 0
        picks.append(Pick(token, None if table is None else look_up(table, token, count)))
    return picks


def score_prompt(item: Work, done: int, logits: torch.Tensor) -> list[LogProbs]:
    """Log probabilities of the prompt's tokens that follow the ids of a scored row; `done` is the position of
    its first id.

    logits [len(item.ids), vocabulary] fp32. Empty for a row that is not scored.
    """
    if not item.scored:
        return []
    sequence = item.sequence
    following = sequence.ids[done + 1 : min(done + 1 + len(item.ids), sequence.prompt_len)]
    return look_up_each(logits, following, sequence.settings.logprobs or 0)


def _pick(sequence: Sequence, logits: torch.Tensor, seen: Callable[[Sequence], torch.Tensor]) -> torch.Tensor:
    """Logits [1, vocabulary] -> [2]: the token, and its faults; without a host sync."""
    settings = sequence.settings
    if not settings.processors and not settings.do_sample:
        token, score = _largest(logits[0])
        return torch.stack([token, BROKEN * score.isnan().to(token.dtype)])
    broken = logits.isnan().any()
    scores = logits
    if settings.processors:
        ids = seen(sequence)
        with blamed_on(sequence):
            scores = settings.processors(ids, logits)
    token, score = _largest(scores[0])
    if settings.do_sample:
        drawn = draw(torch.softmax(scores, dim=-1), settings.generator)
        # of scores that overflowed softmax makes NaN, which says nothing about who is likely
        token = torch.where(score.isfinite(), drawn, token)
    masked = ~(score > -torch.inf)
    return torch.stack([token, BROKEN * broken.to(token.dtype) + MASKED * masked.to(token.dtype)])


def _largest(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of the largest score [V] fp32, int64 [], and that score; NaN counts as the largest.

    On a CPU by numpy, which takes a twentieth of torch's time, half a millisecond for 152 thousand. On a
    device torch would wait for an index that is used in brackets."""
    if scores.is_cpu:
        index = int(scores.numpy().argmax())
        return torch.tensor(index), scores[index]
    token = scores.argmax()
    return token, scores.gather(0, token.view(1)).squeeze(0)
